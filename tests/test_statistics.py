"""One-pass, cached, resumable second moments against one plain pass per layer."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model, tiny_tokenizer, training_text
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.algorithm.nullspace import Spectrum
from hf_alphaedit.errors import StatisticsError
from hf_alphaedit.models.weights import EditSite
from hf_alphaedit.packing import pack
from hf_alphaedit.statistics import SecondMoments, collect_second_moments, load_second_moments, save_legacy_moments
from hf_alphaedit.statistics_files import read_legacy_moment, read_moments, write_legacy_moment
from hf_alphaedit.statistics_report import report_statistics


LAYERS = (1, 2, 3)
LENGTH = 48
DOWN_PROJECTIONS = {
    "llama": "model.layers.{}.mlp.down_proj",
    "gpt2": "transformer.h.{}.mlp.c_proj",
    "gptj": "transformer.h.{}.mlp.fc_out",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "opt": "model.decoder.layers.{}.fc2",
}
TOKENS = 700  # 14 full sequences and one of 28


def sites_of(model: PreTrainedModel, layers: tuple[int, ...] = LAYERS) -> list[EditSite]:
    path = DOWN_PROJECTIONS[model.config.model_type]
    return [EditSite(path.format(layer), layer, model.get_submodule(path.format(layer))) for layer in layers]


def collect(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    texts: Any = None,
    layers: tuple[int, ...] = LAYERS,
    **changes: Any,
) -> SecondMoments:
    arguments = {
        "num_tokens": TOKENS,
        "sequence_length": LENGTH,
        "base_fingerprint": "base",
        "tokenizer_fingerprint": "tokenizer",
        "corpus_name": "sentences",
        "cache_directory": directory,
    }
    texts = training_text() if texts is None else texts
    return collect_second_moments(model, tokenizer, sites_of(model, layers), texts, **(arguments | changes))


def plain_keys(model: PreTrainedModel, site: EditSite, tokenizer: PreTrainedTokenizerBase) -> list[torch.Tensor]:
    """The keys of every sequence (T, d) float64, from a pass of the whole model for this site alone."""
    keys: list[torch.Tensor] = []
    handle = site.module.register_forward_hook(
        lambda _, inputs, __: keys.append(inputs[0].double().reshape(-1, width))
    )
    width = site.read().shape[1]
    with torch.no_grad():
        for sequence in pack(training_text(), tokenizer, TOKENS, LENGTH).long().split(LENGTH):
            model(sequence[None])
    handle.remove()
    return keys


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


def largest_error(first: SecondMoments, second: SecondMoments) -> float:
    return max(relative_error(first.moments[name], second.moments[name].double()) for name in first.moments)


def unreadable() -> Iterator[str]:
    raise AssertionError("the corpus was read although everything is cached")
    yield ""


@pytest.mark.parametrize("name", list(DOWN_PROJECTIONS))
def test_one_pass_equals_one_plain_pass_per_layer(
    name: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = tiny_model(name)
    result = collect(model, tokenizer, tmp_path)
    assert result.tokens == TOKENS
    assert not result.from_cache
    for site in sites_of(model):
        keys = torch.cat(plain_keys(model, site, tokenizer))
        assert keys.shape[0] == TOKENS
        assert relative_error(result.moments[site.name], keys.T @ keys / TOKENS) < 1e-6


def test_the_files_hold_the_moments_of_even_and_odd_sequences(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    result = collect(tiny_llama, tokenizer, tmp_path)
    for site in sites_of(tiny_llama):
        keys = plain_keys(tiny_llama, site, tokenizer)
        for half, moment in enumerate(read_moments(result.files[site.name])[0]):
            expected = torch.cat(keys[half::2])
            assert moment.count == expected.shape[0]
            assert relative_error(moment.mean(), expected.T @ expected / expected.shape[0]) < 1e-6


@pytest.mark.parametrize("tokens_per_batch", [1, 100, 10**6])
def test_batch_size_does_not_matter(
    tokens_per_batch: int, tiny_gpt2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    expected = collect(tiny_gpt2, tokenizer, tmp_path / "a")
    result = collect(tiny_gpt2, tokenizer, tmp_path / "b", tokens_per_batch=tokens_per_batch)
    assert result.tokens == expected.tokens
    assert largest_error(result, expected) < 1e-6


def test_padding_side_does_not_matter(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    right = collect(tiny_llama, tiny_tokenizer(), tmp_path / "a")
    left = collect(tiny_llama, tiny_tokenizer(padding_side="left", pad=False), tmp_path / "b")
    assert largest_error(left, right) == 0


def test_bos_begins_every_sequence_and_counts_unless_told_otherwise(
    tiny_llama: PreTrainedModel, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer("metaspace", bos=True)
    sequences = pack(training_text(), tokenizer, TOKENS, LENGTH).split(LENGTH)
    assert {int(sequence[0]) for sequence in sequences} == {tokenizer.bos_token_id}
    site = sites_of(tiny_llama)[-1]
    keys = plain_keys(tiny_llama, site, tokenizer)
    for count_first, used in ((True, keys), (False, [key[1:] for key in keys])):
        result = collect(tiny_llama, tokenizer, tmp_path, count_first=count_first)
        expected = torch.cat(used)
        assert result.tokens == expected.shape[0]
        assert relative_error(result.moments[site.name], expected.T @ expected / len(expected)) < 1e-6


def test_nothing_runs_after_the_last_site_and_the_model_is_left_as_it_was(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tiny_llama.train()
    parameters = dict(tiny_llama.named_parameters())
    next(iter(parameters.values())).requires_grad_(False)
    before = {name: (value.clone(), value.requires_grad) for name, value in parameters.items()}
    random_state = torch.random.get_rng_state()
    ran: list[str] = []
    modules = {
        "head": tiny_llama.lm_head,
        "next block": tiny_llama.model.layers[4],
        "site": sites_of(tiny_llama)[0].module,
    }
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name)) for name, module in modules.items()
    ]
    collect(tiny_llama, tokenizer, tmp_path, forward_dtype=torch.bfloat16)
    for handle in handles:
        handle.remove()
    assert set(ran) == {"site"}
    assert all(module.training for module in tiny_llama.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_llama.modules())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    for name, value in tiny_llama.named_parameters():
        assert torch.equal(value, before[name][0])
        assert value.requires_grad == before[name][1]


def test_sequences_are_never_longer_than_the_models_context(
    tiny_gpt2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    result = collect(tiny_gpt2, tokenizer, tmp_path, sequence_length=10_000)
    expected = collect(tiny_gpt2, tokenizer, tmp_path / "b", sequence_length=128)
    assert largest_error(result, expected) == 0


def test_a_short_corpus_is_used_whole_with_a_warning(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = collect(tiny_llama, tokenizer, tmp_path, texts=["one text", "another"], num_tokens=5000)
    assert result.tokens == len(tokenizer("one text").input_ids) + len(tokenizer("another").input_ids) + 2
    assert "fewer than the 5000 asked for" in caplog.text


# Precision


@pytest.mark.parametrize(
    ("setting", "least", "most"),
    [({"product_dtype": torch.bfloat16}, 1e-6, 2e-3), ({"forward_dtype": torch.bfloat16}, 1e-5, 3e-2)],
)
def test_bfloat16_is_close(
    setting: dict[str, torch.dtype],
    least: float,
    most: float,
    tiny_llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    expected = collect(tiny_llama, tokenizer, tmp_path)
    result = collect(tiny_llama, tokenizer, tmp_path, **setting)
    assert not result.from_cache  # another dtype is another moment
    assert least < largest_error(result, expected) < most


def test_a_bfloat16_model_has_float32_moments(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = tiny_llama.to(torch.bfloat16)
    result = collect(model, tokenizer, tmp_path)
    keys = torch.cat(plain_keys(model, sites_of(model)[0], tokenizer))
    moment = result.moments[sites_of(model)[0].name]
    assert moment.dtype == torch.float32
    assert relative_error(moment, keys.T @ keys / len(keys)) < 1e-2  # a batch rounds otherwise than a single row


# The cache


def test_the_second_call_reads_the_cache_and_nothing_else(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    first = collect(tiny_llama, tokenizer, tmp_path)
    second = collect(tiny_llama, tokenizer, tmp_path, texts=unreadable())
    assert second.from_cache
    assert second.tokens == TOKENS
    for name, moment in first.moments.items():
        assert torch.equal(second.moments[name], moment)
    assert sorted(tmp_path.iterdir()) == sorted(first.files.values())  # no checkpoint, no temporary file


@pytest.mark.parametrize(
    "change",
    [
        {"base_fingerprint": "other"},
        {"tokenizer_fingerprint": "other"},
        {"corpus_name": "other"},
        {"num_tokens": 500},
        {"sequence_length": 32},
        {"count_first": False},
        {"force": True},
    ],
)
def test_whatever_the_moments_depend_on_is_part_of_the_key(
    change: dict[str, Any], tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    collect(tiny_llama, tokenizer, tmp_path)
    assert not collect(tiny_llama, tokenizer, tmp_path, **change).from_cache


def test_only_missing_layers_are_computed(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    first = collect(tiny_llama, tokenizer, tmp_path, layers=(1, 2))
    stamps = {path: path.stat().st_mtime_ns for path in first.files.values()}
    both = collect(tiny_llama, tokenizer, tmp_path, layers=(1, 2, 3))
    assert {path: path.stat().st_mtime_ns for path in first.files.values()} == stamps
    whole = collect(tiny_llama, tokenizer, tmp_path / "b", layers=(1, 2, 3))
    assert largest_error(both, whole) < 1e-6


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path: Path) -> None:
    path.write_bytes(b"not a safetensors file at all")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def poison(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:-400] + b"\xff" * 400)  # NaN


def swap(path: Path) -> None:
    """Another layer's moments under this name."""
    other = next(file for file in sorted(path.parent.iterdir()) if file != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("damage", [cut, garble, empty, poison, swap])
def test_a_damaged_or_foreign_cache_file_is_computed_again_and_reported(
    damage: Callable[[Path], None],
    tiny_llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = collect(tiny_llama, tokenizer, tmp_path)
    victim = first.files[sites_of(tiny_llama)[1].name]
    damage(victim)
    with pytest.raises(StatisticsError, match="compute (it|them) again|damaged"):
        read_moments(victim, {"site": sites_of(tiny_llama)[1].name})
    second = collect(tiny_llama, tokenizer, tmp_path)
    assert not second.from_cache
    assert str(victim) in caplog.text
    assert largest_error(second, first) < 1e-6
    assert collect(tiny_llama, tokenizer, tmp_path, texts=unreadable()).from_cache


# Checkpoints


SLOW_RUN = """
import sys, time
from pathlib import Path
from test_statistics import collect, sites_of, tiny_model, tiny_tokenizer

model = tiny_model("llama")
sites_of(model)[0].module.register_forward_hook(lambda *_: time.sleep(0.05))
collect(model, tiny_tokenizer(), Path(sys.argv[1]), tokens_per_batch=48, checkpoint_seconds=0.0)
"""


def test_a_killed_run_goes_on_from_its_checkpoint(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "cache"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(directory)], env=environment)
    deadline = time.monotonic() + 60
    while not list(directory.glob("*.checkpoint")) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.2)  # somewhere in the middle of the run
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    forwards: list[int] = []
    handle = sites_of(tiny_llama)[0].module.register_forward_hook(lambda *_: forwards.append(1))
    with caplog.at_level(logging.INFO):
        resumed = collect(tiny_llama, tokenizer, directory, tokens_per_batch=48)
    handle.remove()
    assert "going on after" in caplog.text
    assert 0 < len(forwards) < 14
    assert largest_error(resumed, collect(tiny_llama, tokenizer, tmp_path / "whole")) < 1e-6
    assert not list(directory.glob("*.checkpoint"))


def interrupt_after(site: EditSite, forwards: int) -> Any:
    """A hook that ends the run as Ctrl-C does."""
    seen = []

    def hook(*_: Any) -> None:
        seen.append(1)
        if len(seen) > forwards:
            raise KeyboardInterrupt

    return site.module.register_forward_hook(hook)


@pytest.mark.parametrize("damage", [cut, garble])
def test_a_damaged_checkpoint_means_starting_again(
    damage: Callable[[Path], None],
    tiny_llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    handle = interrupt_after(sites_of(tiny_llama)[0], forwards=5)
    with pytest.raises(KeyboardInterrupt):
        collect(tiny_llama, tokenizer, tmp_path, tokens_per_batch=48, checkpoint_seconds=0)
    handle.remove()
    (checkpoint,) = tmp_path.glob("*.checkpoint")
    damage(checkpoint)
    result = collect(tiny_llama, tokenizer, tmp_path)
    assert "starting again" in caplog.text
    assert largest_error(result, collect(tiny_llama, tokenizer, tmp_path / "whole")) < 1e-6


# When things go wrong


def test_out_of_memory_halves_the_batch(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes: list[int] = []

    def fail_above_two(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        sizes.append(inputs[0].shape[0])
        if inputs[0].shape[0] > 2:
            raise torch.OutOfMemoryError("Tried to allocate 1 GiB. The device is out of memory.")

    handle = tiny_llama.model.layers[2].mlp.down_proj.register_forward_pre_hook(fail_above_two)
    result = collect(tiny_llama, tokenizer, tmp_path, tokens_per_batch=8 * LENGTH)
    handle.remove()
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 1]
    assert "out of memory" in caplog.text
    assert largest_error(result, collect(tiny_llama, tokenizer, tmp_path / "b")) < 1e-6


def test_out_of_memory_with_one_sequence_is_the_users_to_see(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("The device is out of memory.")

    handle = tiny_llama.model.layers[2].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        collect(tiny_llama, tokenizer, tmp_path)
    handle.remove()


def test_keys_that_overflow_are_refused(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with torch.no_grad():
        tiny_llama.model.layers[2].mlp.up_proj.weight[3].fill_(float("inf"))
    with pytest.raises(StatisticsError, match=r"layers\.2\.mlp\.down_proj are not finite"):
        collect(tiny_llama, tokenizer, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_site_that_never_runs_is_named(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    idle = EditSite("nowhere", 1, nn.Linear(64, 32))
    with pytest.raises(StatisticsError, match="'nowhere'"):
        collect_second_moments(
            tiny_llama, tokenizer, [idle, *sites_of(tiny_llama)], training_text(), num_tokens=TOKENS,
            sequence_length=LENGTH, base_fingerprint="b", tokenizer_fingerprint="t", corpus_name="c",
            cache_directory=tmp_path,
        )  # fmt: skip


def test_offloaded_models_give_the_same_moments(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from accelerate import cpu_offload

    expected = collect(tiny_llama, tokenizer, tmp_path / "a")
    result = collect(cpu_offload(tiny_model("llama")), tokenizer, tmp_path / "b")
    assert largest_error(result, expected) == 0


# Several processes


DISTRIBUTED_RUN = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from hf_alphaedit.processes import Processes
from test_statistics import collect, tiny_model, tiny_tokenizer

directory = Path(sys.argv[1])
result = collect(tiny_model("llama"), tiny_tokenizer(), directory)
again = collect(tiny_model("llama"), tiny_tokenizer(), directory)
assert again.from_cache and Processes.current().count == 2
rank = Processes.current().rank
save_file(result.moments, directory / f"rank{rank}.result")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_give_the_moments_of_one(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED_RUN)
    directory = tmp_path / "cache"
    # `--multi_gpu` with ACCELERATE_USE_CPU, since `--cpu` alone starts a single process unless MPI is there.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    subprocess.run([*launch, str(script), str(directory)], env=environment, check=True, timeout=300)
    expected = collect(tiny_llama, tokenizer, tmp_path / "one")
    for rank in range(2):
        moments = load_file(directory / f"rank{rank}.result")
        for name, moment in expected.moments.items():
            assert relative_error(moments[name], moment.double()) < 1e-6
    assert len(list(directory.glob("*.safetensors"))) == len(LAYERS)
    assert not list(directory.glob("*.checkpoint"))


# Files of MEMIT and AlphaEdit


def test_legacy_files_hold_a_sum_that_is_divided_by_the_count(tmp_path: Path) -> None:
    keys = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    path = tmp_path / "model.layers.5.mlp.down_proj_float32_mom2_100000.npz"
    numpy.savez(path, **{"mom2.count": 50, "mom2.mom2": (keys.T @ keys).numpy(), "sample_size": 7})
    moment = read_legacy_moment(path, 12)
    assert moment.count == 50
    assert relative_error(moment.mean(), (keys.T @ keys).double() / 50) < 1e-6


def test_legacy_round_trip_has_the_same_names(tmp_path: Path) -> None:
    keys = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    mean = keys.T @ keys / 50
    write_legacy_moment(tmp_path / "moment.npz", mean, 50, sample_size=7)
    with numpy.load(tmp_path / "moment.npz", allow_pickle=False) as file:
        assert set(file) == {"mom2.constructor", "mom2.count", "mom2.mom2", "constructor", "sample_size"}
        assert (file["mom2.mom2"].dtype, file["mom2.mom2"].shape) == (numpy.float32, (12, 12))
        assert (int(file["mom2.count"]), int(file["sample_size"])) == (50, 7)
    assert relative_error(read_legacy_moment(tmp_path / "moment.npz").mean(), mean.double()) < 1e-6


def test_unusable_legacy_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "moment.npz"
    with pytest.raises(StatisticsError, match="can't be read"):
        read_legacy_moment(path)
    numpy.savez(path, **{"mom2.count": 5, "mom2.mom2": numpy.eye(4)})
    with pytest.raises(StatisticsError, match=r"\(4, 4\).*\(6, 6\)"):
        read_legacy_moment(path, 6)
    cut(path)
    with pytest.raises(StatisticsError, match="can't be read"):
        read_legacy_moment(path)
    numpy.savez(path, **{"mom2.count": 5})
    with pytest.raises(StatisticsError, match="mom2"):
        read_legacy_moment(path)
    numpy.savez(path, **{"mom2.count": 5, "mom2.mom2": numpy.array([{"a": 1}], dtype=object)})
    with pytest.raises(StatisticsError, match="can't be read"):  # pickled objects are not opened
        read_legacy_moment(path)


def test_moments_are_loaded_from_a_folder_of_either_kind(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    expected, sites = collect(tiny_llama, tokenizer, tmp_path / "own"), sites_of(tiny_llama)
    own = load_second_moments(tmp_path / "own", sites, "base")
    assert (largest_error(own, expected), own.tokens, own.corpus) == (0, TOKENS, "sentences")
    paths = save_legacy_moments(expected, tmp_path / "legacy", sample_size=30)
    assert paths[0].name == "model.layers.1.mlp.down_proj_float32_mom2_30.npz"
    legacy = load_second_moments(tmp_path / "legacy", sites, "base")
    assert largest_error(legacy, expected) < 1e-6
    assert legacy.tokens == TOKENS
    spectra = {name: Spectrum.of(moment) for name, moment in legacy.moments.items()}
    assert report_statistics(legacy, spectra, lambda spectrum: 20).sites[0].overlap is None  # no halves in there


def test_a_folder_that_does_not_fit_is_refused(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    sites = sites_of(tiny_llama)
    with pytest.raises(StatisticsError, match="has 0 files"):
        load_second_moments(tmp_path, sites, "base")
    collect(tiny_llama, tokenizer, tmp_path)
    with pytest.raises(StatisticsError, match="belongs to other weights"):
        load_second_moments(tmp_path, sites, "another base")
    collect(tiny_llama, tokenizer, tmp_path, num_tokens=300)
    with pytest.raises(StatisticsError, match="has 2 files"):
        load_second_moments(tmp_path, sites, "base")


# The report


def test_report_describes_spectrum_and_convergence(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    statistics = collect(tiny_llama, tokenizer, tmp_path)
    spectra = {name: Spectrum.of(moment) for name, moment in statistics.moments.items()}
    report = report_statistics(statistics, spectra, lambda spectrum: spectrum.null_rank_by_energy(0.3))
    assert [entry.site for entry in report.sites] == [site.name for site in sites_of(tiny_llama)]
    for entry in report.sites:
        energies = spectra[entry.site].eigenvalues.flip(0)
        assert energies[: entry.energy_directions["0.9"]].sum() >= 0.9 * energies.sum()
        assert energies[: entry.energy_directions["0.9"] - 1].sum() < 0.9 * energies.sum()
        assert entry.eigenvalues["1"] == pytest.approx(float(energies[0]))
        assert 0 < entry.null_energy <= 0.3 < entry.held_out_energy < 1
        assert entry.chance_overlap < entry.overlap < 1
    assert "free directions" in str(report)
    assert "sentences" in str(report)
    assert report.to_dict()["sites"][0]["dimension"] == 64
    assert report.warnings == []


def test_more_text_brings_the_halves_together(tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(3, 400, (400, 40), generator=generator).tolist()
    entries = []
    for tokens in (300, 12_000):
        statistics = collect(tiny_llama, tokenizer, tmp_path, texts=documents, num_tokens=tokens, layers=(1,))
        spectra = {name: Spectrum.of(moment) for name, moment in statistics.moments.items()}
        report = report_statistics(statistics, spectra, lambda spectrum: spectrum.null_rank_by_energy(0.3))
        entries.append(report.sites[0])
    few, many = entries
    assert many.overlap > few.overlap + 0.1
    assert abs(many.held_out_energy - many.null_energy) < 0.3 * abs(few.held_out_energy - few.null_energy)


def test_report_warns_of_a_rule_that_protects_all_or_nothing(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    statistics = collect(tiny_llama, tokenizer, tmp_path, num_tokens=40, layers=(1,))  # a single sequence
    spectra = {name: Spectrum.of(moment) for name, moment in statistics.moments.items()}
    nothing = report_statistics(statistics, spectra, lambda spectrum: 64)
    everything = report_statistics(statistics, spectra, lambda spectrum: 0)
    assert "nothing is protected" in nothing.warnings[0]
    assert "no edit is possible" in everything.warnings[0]
    assert "40 tokens can't span 64 dimensions" in str(everything)
    assert everything.sites[0].overlap is None
