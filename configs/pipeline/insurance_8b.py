"""Question: the whole method with real models. What do finance CPT and a 70B teacher's conversations add to Llama 3.1 Swallow 8B?

    python -m experiments.pipeline --config=configs/pipeline/insurance_8b.py:h100x8 --workdir=runs/insurance_8b
    python -m tools.plan --config=configs/pipeline/insurance_8b.py:h100x8 --device=h100 --price=2.5    # every stage, and the sum

The argument is a mesh: h100x8 (one machine) or v5p-16 (two hosts: its training stages by tools.launch --to=tpu, one command
each, such as "python -m experiments.cpt --config=configs/cpt/insurance_8b.py:v5p-16,finance --workdir=runs/insurance_8b/cpt";
the other stages on one host; the pipeline finds them finished). Everything in `downloads` is looked for before the first stage
starts; a second start goes on where the first one ended. Order: the untouched models first, which takes minutes and shows what
is wrong with a machine; the teacher (start its server after --until=general, end it after --until=synthesize); then what costs
most.

Six arms: base, instruct with examples, SFT, instruct + SFT, CPT + SFT, and the control whose CPT read as many tokens of general
text. Token budget: two CPTs of 1.0 B; twelve SFT runs of about 30 M; 40,000 requests to the teacher at most. Answer: none yet,
the run needs accelerators. Published names of trained models must begin with "Llama", and say "Built with Llama".
"""

from ml_collections import ConfigDict

LLAMA = "Llama 3.1 Community Licence"
HUB = "hf download tokyotech-llm/{0} --local-dir models/{0}"
SEEDS = (0, 1, 2)

DOWNLOADS = (
    {
        "path": "models/Llama-3.1-Swallow-8B-v0.2",
        "what": "the base (16 GB); SFT wants a chat_template in its tokenizer_config.json, else copy that of the Instruct model",
        "licence": LLAMA,
        "get": HUB.format("Llama-3.1-Swallow-8B-v0.2"),
    },
    {
        "path": "models/Llama-3.1-Swallow-8B-Instruct-v0.2",
        "what": "the instruct model of two arms (16 GB)",
        "licence": f"{LLAMA} and Gemma Terms of Use",
        "get": HUB.format("Llama-3.1-Swallow-8B-Instruct-v0.2"),
    },
    {
        "path": "models/Llama-3.1-Swallow-70B-Instruct-v0.3",
        "what": "the teacher (141 GB)",
        "licence": f"{LLAMA} and Gemma Terms of Use",
        "get": HUB.format("Llama-3.1-Swallow-70B-Instruct-v0.3"),
    },
    {
        "path": "models/Qwen3-Swallow-8B-SFT-v0.2",
        "what": "the second reader of the teacher's conversations, of another family (16 GB)",
        "licence": "Apache-2.0",
        "get": HUB.format("Qwen3-Swallow-8B-SFT-v0.2"),
    },
    {
        "path": "data/finance/edinet",
        "what": "securities reports, zip files of documents/{docID}?type=5",
        "licence": "PDL-1.0",
        "get": "the EDINET API v2 (a key is free), https://disclosure2.edinet-fsa.go.jp/",
    },
    {
        "path": "data/finance/fsa",
        "what": "guidelines, Q&A and administrative actions of the Financial Services Agency, HTML and PDF",
        "licence": "PDL-1.0",
        "get": "saving the pages of https://www.fsa.go.jp/",
    },
    {
        "path": "data/finance/laws",
        "what": "statutes, XML",
        "licence": "none (Copyright Act, Article 13)",
        "get": "the bulk download of https://laws.e-gov.go.jp/",
    },
    {
        "path": "data/finance/wikipedia",
        "what": "articles of the finance categories, Parquet with id, url, title, text",
        "licence": "CC-BY-SA-4.0",
        "get": "hf download wikimedia/wikipedia --repo-type=dataset --include '20231101.ja/*', filtered by category",
    },
    {
        "path": "data/general/fineweb2_ja",
        "what": "Japanese web text for replay and control, some Parquet files",
        "licence": "ODC-By-1.0",
        "get": "hf download HuggingFaceFW/fineweb-2 --repo-type=dataset --include 'data/jpn_Jpan/train/*'",
    },
    {
        "path": "data/general/fineweb_edu",
        "what": "English web text for replay and control, some Parquet files",
        "licence": "ODC-By-1.0",
        "get": "hf download HuggingFaceFW/fineweb-edu --repo-type=dataset --include 'sample/10BT/*'",
    },
)


def get_config(mesh: str = "h100x8") -> ConfigDict:
    c = ConfigDict()
    c.downloads = DOWNLOADS
    sft = [
        {"name": f"{name}_{seed}", "program": "sft", "config": f"configs/sft/insurance_8b.py:{mesh},{init},{seed}"}
        for name, init in (("sft", "base"), ("instruct_sft", "instruct"), ("cpt_sft", "cpt"), ("control_sft", "control"))
        for seed in SEEDS
    ]
    c.stages = (
        {"name": "untouched", "program": "evaluate", "config": "configs/evaluate/insurance_8b.py:untouched"},
        {"name": "finance", "program": "prepare", "config": "configs/prepare/insurance_8b.py:finance"},
        {"name": "general", "program": "prepare", "config": "configs/prepare/insurance_8b.py:general"},
        {"name": "synthesize", "program": "synthesize", "config": f"configs/synthesize/insurance_8b.py:{mesh}"},
        {"name": "cpt", "program": "cpt", "config": f"configs/cpt/insurance_8b.py:{mesh},finance"},
        {"name": "control", "program": "cpt", "config": f"configs/cpt/insurance_8b.py:{mesh},general"},
        *sft,
        {"name": "evaluate", "program": "evaluate", "config": "configs/evaluate/insurance_8b.py"},
        {"name": "report", "program": "report", "config": "configs/report/insurance_8b.py"},
    )
    return c
