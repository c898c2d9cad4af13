"""Model shapes for runs that start from random weights, as the fields of HF's config.json."""

from ml_collections import ConfigDict


def llama_demo() -> ConfigDict:
    """The demo's base: 0.69 M parameters beside a tied 4,096 x 128 embedding."""
    return ConfigDict(
        {
            "vocab_size": 4096,
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "max_position_embeddings": 1024,
            "rope_theta": 10000.0,
        }
    )


def llama31(size: str) -> ConfigDict:
    """Llama 3.1 as published (and Llama 3.1 Swallow, which keeps shapes and vocabulary): "8b" or "70b".

    Source: config.json of the checkpoints; the limit of 8,192 positions is that of Llama-3.1-Swallow-8B.
    """
    shapes = {"8b": (4096, 14336, 32, 32), "70b": (8192, 28672, 80, 64)}
    if size not in shapes:
        raise ValueError(f"llama31({size!r}): known sizes are {', '.join(shapes)}")
    hidden, feed_forward, layers, heads = shapes[size]
    return ConfigDict(
        {
            "vocab_size": 128256,
            "hidden_size": hidden,
            "intermediate_size": feed_forward,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "max_position_embeddings": 8192,
            "rope_theta": 500000.0,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        }
    )
