"""Question: what does the published baseline, GPT-4o of 2024-11-20, reach on test_v1?

    OPENAI_API_KEY=... python -m experiments.evaluate --config=configs/evaluate/gpt4o.py --workdir=runs/evaluate/gpt4o
    python -m experiments.evaluate --config=configs/evaluate/gpt4o.py:FILE --workdir=runs/evaluate/gpt4o_replayed

The model leaves the API on 2027-01-14. Every raw response is kept as it comes in, in responses_gpt-4o_0.jsonl of the run folder;
what was paid for is not asked again after a failure, and the second command replays that FILE without network, to the same
numbers.
Asked with the full definitions, since an untuned model has not learnt them. Cost: 408 answers of about 2,000 tokens read and
10 written, some 2.1 US dollars at the price below.
"""

from ml_collections import ConfigDict

from configs.evaluate import demo, test_v1, tiny

MODEL = "gpt-4o-2024-11-20"
PRICE = {
    "currency": "USD",
    "source": "OpenAI's price list of 2024-11 for gpt-4o-2024-11-20; check it before a run",
    "input_per_million": 2.5,
    "output_per_million": 10.0,
}


def get_config(recorded: str = "") -> ConfigDict:
    c = tiny.get_config()
    c.test_set = "v1"
    c.operating = test_v1.operating()
    entry = {"name": "gpt-4o", "price": PRICE, **demo.endpoint_entry("https://api.openai.com/v1", MODEL)}
    if recorded:
        entry = {"name": "gpt-4o", "price": PRICE, "kind": "recorded", "seed": 0, "path": recorded, "asking": entry["asking"]}
    c.models = (*c.models, entry)
    c.comparisons = (
        {"a": "gpt-4o", "b": "constant", "metric": "exact_category"},
        {"a": "gpt-4o", "b": "keywords", "metric": "exact_category"},
    )
    return c
