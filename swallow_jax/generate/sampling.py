"""Draw one token a row: temperature, then top-k, then top-p, as transformers' logits processors order them.

Letters: B batch, V vocabulary, C candidates. Every parameter is an array, so no setting causes a recompilation.

A draw is the maximum of logit + Gumbel noise over the kept tokens, and the noise of a token is a function of (seed,
position, token id) alone. So a draw depends neither on the slot nor on the company nor on the order of candidates, and
the fast path (the C largest logits) and the full path agree on which token wins.
"""

import functools

import jax
import jax.numpy as jnp

CANDIDATES = 256  # a sort of V=128k costs 80 times the top-256, whose mass nearly always exceeds top_p


def sample(
    logits_BV: jax.Array,
    seeds_B: jax.Array,
    positions_B: jax.Array,
    temperature_B: jax.Array,
    top_k_B: jax.Array,
    top_p_B: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One token a row and its log-probability.

    Args:
      logits_BV: float32 scores.
      seeds_B: uint32, the request's seed.
      positions_B: int32, the position the drawn token will take; with the seed it keys the noise.
      temperature_B: float32; 0 is greedy (the lowest id among equal logits).
      top_k_B: int32; tokens below the k-th largest logit go, ties with it stay; 0 keeps all.
      top_p_B: float32 in (0, 1]; a token stays while the mass strictly above it is < top_p, so at least one stays. Tokens
        that tie at the border all stay (transformers keeps those that its unstable sort puts last); 1 keeps all.

    Returns:
      (tokens_B int32, logprobs_B float32). The log-probability is the model's own, before temperature and truncation: it
      compares across settings and with the scorer.
    """
    V = logits_BV.shape[-1]
    # The first of the largest: two plain reductions, where argmax carries pairs (XLA:CPU: 0.10 against 0.70 ms, 16 rows of 8192).
    largest_BV = logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True)
    greedy_B = jnp.min(jnp.where(largest_BV, jnp.arange(V, dtype=jnp.int32), V), axis=-1)

    def drawn() -> jax.Array:
        tokens_B = _draw(logits_BV, seeds_B, positions_B, temperature_B, top_k_B, top_p_B)
        return jnp.where(temperature_B > 0, tokens_B, greedy_B)

    tokens_B = jax.lax.cond(jnp.any(temperature_B > 0), drawn, lambda: greedy_B)
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def gumbel(seeds_B: jax.Array, positions_B: jax.Array, ids_BC: jax.Array) -> jax.Array:
    """Standard Gumbel noise [B, C] of the tokens `ids_BC`, random access by id.

    fold_in is one threefry block whose output is the derived key, so the key's first word serves as 32 random bits. The
    implementation is pinned: the default one may change, the tokens of a seed may not.
    """

    def row(seed: jax.Array, position: jax.Array, ids_C: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(ids_C)
        return jax.random.key_data(keys)[:, 0]

    bits_BC = jax.vmap(row)(seeds_B, positions_B, ids_BC)
    # -log(-log(u)) with u = 1 - v: float32 is fine near v = 0, which is where the large values come from (up to 22.9);
    # with u itself the tail would stop at 16.6, too early for 128k draws.
    v_BC = (bits_BC.astype(jnp.float32) + 0.5) * 2.0**-32
    return -jnp.log(-jnp.log1p(-jnp.minimum(v_BC, 1 - 2.0**-24)))


def _draw(logits_BV, seeds_B, positions_B, temperature_B, top_k_B, top_p_B) -> jax.Array:
    V = logits_BV.shape[-1]
    scaled_BV = logits_BV / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    k_B = jnp.where(top_k_B <= 0, V, jnp.minimum(top_k_B, V))
    p_B = jnp.where(top_p_B >= 1, jnp.inf, jnp.maximum(top_p_B, jnp.finfo(jnp.float32).tiny))

    C = min(CANDIDATES, V)
    # Without the barrier XLA merges later slices of `values_BC` into the top-k, no longer recognises it, and sorts the whole
    # vocabulary (measured on XLA:CPU, V = 128k: 40 times slower).
    values_BC, ids_BC = jax.lax.optimization_barrier(jax.lax.top_k(scaled_BV, C))
    kth_B1 = jnp.take_along_axis(values_BC, jnp.minimum(k_B, C)[:, None] - 1, axis=-1)
    inside_BC = values_BC >= jnp.where(k_B <= C, kth_B1[:, 0], -jnp.inf)[:, None]
    # The exact normaliser of what top-k left: the whole vocabulary's, or the sum over the candidates inside.
    total_B = jnp.where(
        k_B < V,
        jax.nn.logsumexp(jnp.where(inside_BC, values_BC, -jnp.inf), axis=-1),
        jax.nn.logsumexp(scaled_BV, axis=-1),
    )
    mass_BC = jnp.where(inside_BC, jnp.exp(values_BC - total_B[:, None]), 0.0)
    # Mass strictly above each candidate: that before the first of its run of equal values.
    first_BC = jnp.concatenate([jnp.ones_like(values_BC[:, :1], bool), values_BC[:, 1:] != values_BC[:, :-1]], axis=-1)
    above_BC = jax.lax.cummax(jnp.where(first_BC, jnp.cumsum(mass_BC, axis=-1) - mass_BC, 0.0), axis=1)
    keep_BC = inside_BC & (above_BC < p_B[:, None])
    noisy_BC = jnp.where(keep_BC, values_BC + gumbel(seeds_B, positions_B, ids_BC), -jnp.inf)
    tokens_B = jnp.take_along_axis(ids_BC, jnp.argmax(noisy_BC, axis=-1)[:, None], axis=-1)[:, 0]

    # Where the last candidate is dropped, every token outside the candidates would be dropped too: the set is complete.
    # Otherwise, and where top-k's normaliser reaches outside, the row needs the whole vocabulary. A row's path depends on
    # the row alone, so its company changes nothing.
    short_B = (temperature_B > 0) & (keep_BC[:, -1] | ((k_B > C) & (k_B < V))) & (C < V)
    return jax.lax.cond(
        jnp.any(short_B),
        lambda: jnp.where(short_B, _draw_full(scaled_BV, seeds_B, positions_B, k_B, p_B, short_B), tokens_B),
        lambda: tokens_B,
    ).astype(jnp.int32)


def _draw_full(scaled_BV, seeds_B, positions_B, k_B, p_B, wanted_B) -> jax.Array:
    """The same draw over the whole vocabulary, without a sort.

    The kept set is an upper set of the logits. So take the noisy maximum over everything, accept it if it lies inside, and
    otherwise drop it with all tokens not above it and try again: the accepted token is the noisy maximum over the kept set.
    A try is accepted with probability >= top_p, so one or two tries are usual.
    """
    B, V = scaled_BV.shape
    any_k = jnp.any(wanted_B & (k_B < V))
    kth_B = jax.lax.cond(any_k, lambda: _kth_largest(scaled_BV, k_B), lambda: jnp.full((B,), -jnp.inf))
    mass_BV = jnp.exp(scaled_BV - jnp.max(scaled_BV, axis=-1, keepdims=True))
    mass_BV = jnp.where(scaled_BV >= kth_B[:, None], mass_BV, 0.0)
    limit_B = p_B * jnp.sum(mass_BV, axis=-1)
    noise_BV = gumbel(seeds_B, positions_B, jnp.broadcast_to(jnp.arange(V), (B, V)))
    noisy_BV = jnp.where(scaled_BV >= kth_B[:, None], scaled_BV + noise_BV, -jnp.inf)

    def attempt(noisy_BV: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        tokens_B = jnp.argmax(noisy_BV, axis=-1)
        higher_BV = scaled_BV > jnp.take_along_axis(scaled_BV, tokens_B[:, None], axis=-1)
        accepted_B = jnp.sum(jnp.where(higher_BV, mass_BV, 0.0), axis=-1) < limit_B
        retry_BV = jnp.where(higher_BV | accepted_B[:, None], noisy_BV, -jnp.inf)
        return tokens_B, accepted_B | ~wanted_B, retry_BV

    first = attempt(noisy_BV)
    return jax.lax.while_loop(lambda s: ~jnp.all(s[1]), lambda s: attempt(s[2]), first)[0]


def _kth_largest(values_BV: jax.Array, k_B: jax.Array) -> jax.Array:
    """The k-th largest value of each row by bisection over the 2^32 floats in order: 32 passes, no sort."""
    bits_BV = jax.lax.bitcast_convert_type(values_BV, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    ordered_BV = jnp.where(bits_BV >= sign, ~bits_BV, bits_BV | sign)  # unsigned order = order of the floats

    def halve(i: jax.Array, low_B: jax.Array) -> jax.Array:
        middle_B = low_B | (sign >> i.astype(jnp.uint32))
        enough_B = jnp.sum(ordered_BV >= middle_B[:, None], axis=-1) >= k_B
        return jnp.where(enough_B, middle_B, low_B)

    key_B = jax.lax.fori_loop(0, 32, halve, jnp.zeros(values_BV.shape[:1], jnp.uint32))
    return jax.lax.bitcast_convert_type(jnp.where(key_B >= sign, key_B ^ sign, ~key_B), jnp.float32)
