"""What the report says of a corpus, summed over its tasks."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from swallow_jax.data import documents


def merged(results: Iterable[Mapping[str, Any]], name: str) -> Counter:
    """The sum of one counter over the tasks."""
    total: Counter = Counter()
    for result in results:
        total.update(result[name])
    return total


def details(domains: list[documents.Domain], annotated: list, compared: list, tokenised: list) -> dict[str, Any]:
    """What the report says beyond the result: by source, sector, rule and kind."""
    sources: dict[str, Counter] = {}
    would: dict[str, Counter] = {}
    for one, other in zip(annotated, tokenised, strict=True):
        lost = {f"dropped: {reason}": count for reason, count in other["dropped"].items()}
        lost |= {f"failed: {kind}": count for kind, count in one["failed"].items()}
        read = one["documents"] + sum(one["failed"].values())
        sources.setdefault(one["source"], Counter()).update({"documents_in": read, **other["of_source"], **lost})
        would.setdefault(one["source"], Counter()).update(other["would_drop"])
    samples: dict[str, list] = {}
    for part in tokenised:
        for kind, drawn in part["samples"].items():
            samples[kind] = sorted(samples.get(kind, []) + drawn, key=lambda row: row["rank"])[:3]
    licences = [
        {"source": source.id, "licence": source.licence, "attribution": source.attribution}
        | ({"reason": source.reason} if source.reason else {})
        for domain in domains
        for source in domain.sources
    ]
    terms, found = [term for domain in domains for term in domain.glossary], merged(tokenised, "glossary")
    return {
        "sources": sources,
        "licences": licences,
        "paragraphs_dropped": merged(annotated, "removed") + merged(compared, "paragraphs"),
        "characters_rewritten": merged(annotated, "rewrites"),
        "personal_data_masked": merged(annotated, "masked"),
        "documents_with_seed_word": merged(annotated, "seed_words"),
        "overruled_by_experts": merged(annotated, "overruled"),
        "characters_by_sector": merged(tokenised, "sectors"),
        "documents_by_length": merged(tokenised, "lengths"),
        "would_fall_by_swallow_v1": would,
        "glossary": {"terms": len(terms), "found": sum(term in found for term in terms), "documents": found}
        | {"missing": [term for term in terms if term not in found]},
        "contaminated": [hit for part in tokenised for hit in part["contaminated"]],
        "samples": samples,
    }
