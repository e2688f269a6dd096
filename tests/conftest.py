"""Fixtures for every test, and the environment that they run in: offline, and with caches of their own."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


# The Hub client and the thread pools read their settings once, when they are imported: this must come first.
# Every xdist worker imports this file in a process of its own, so no two workers share a cache.
CACHE = Path(tempfile.mkdtemp(prefix="hf-alphaedit-tests-"))
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=str(CACHE),
    HF_HUB_CACHE=str(CACHE / "hub"),
    HF_ASSETS_CACHE=str(CACHE / "assets"),
    HF_DATASETS_CACHE=str(CACHE / "datasets"),
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    MPLBACKEND="agg",
)
PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if PARALLEL:  # as many workers as cores: more threads than one each would only wait for each other
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")

import pytest  # noqa: E402
import torch  # noqa: E402
from gemma3 import gemma3_checkpoint  # noqa: E402
from packaged_models import PackageNotInstalledError, load_checkpoint  # noqa: E402
from smollm2 import smollm2_checkpoint  # noqa: E402
from tiny import tiny_model, tiny_tokenizer  # noqa: E402
from transformers import PreTrainedModel, PreTrainedTokenizerBase  # noqa: E402


if PARALLEL:
    torch.set_num_threads(1)


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level tokenizer with a pad token, right padding and no BOS; `tiny_tokenizer` builds the others."""
    return tiny_tokenizer()


@pytest.fixture
def tiny_llama() -> PreTrainedModel:
    """Linear layers, rotary positions, blocks that return a tensor."""
    return tiny_model("llama")


@pytest.fixture
def tiny_gpt2() -> PreTrainedModel:
    """Conv1D layers (weights stored input-first), learned positions, tied embeddings."""
    return tiny_model("gpt2")


@pytest.fixture(scope="session")
def data_directory() -> Path:
    """Evaluation data that is not part of the repository: CounterFact, zsRE, Wikipedia text and so on."""
    named = os.environ.get("HF_ALPHAEDIT_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("no evaluation data: set HF_ALPHAEDIT_DATA to the folder that has it")
    return Path(named)


@pytest.fixture(scope="session")
def models_directory(pytestconfig: pytest.Config) -> Path:
    """Where converted real models stay between runs: pytest's own cache, which `make clean` removes."""
    return Path(pytestconfig.cache.mkdir("models")) if hasattr(pytestconfig, "cache") else CACHE / "models"


@pytest.fixture(scope="session")
def smollm2_directory(models_directory: Path) -> Path:
    """SmolLM2-135M-Instruct as a plain transformers checkpoint, for tests marked `slow`."""
    try:
        return smollm2_checkpoint(models_directory)
    except PackageNotInstalledError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def gemma3_directory(models_directory: Path) -> Path:
    """Gemma-3-270m (a norm follows every down-projection) as a plain checkpoint, for tests marked `slow`."""
    try:
        return gemma3_checkpoint(models_directory)
    except PackageNotInstalledError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(smollm2_directory: Path) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase]]:
    """SmolLM2-135M-Instruct in float32, shared by the whole session: a test that edits it must undo its edits.

    A test that keeps its edits loads a model of its own from `smollm2_directory`.
    """
    model, tokenizer = load_checkpoint(smollm2_directory, torch.float32)
    before = _checksum(model)
    yield model, tokenizer
    assert _checksum(model) == before, "a test changed the shared SmolLM2 model and did not undo it"


def _checksum(model: PreTrainedModel) -> list[float]:
    return [parameter.double().sum().item() for parameter in model.parameters()]
