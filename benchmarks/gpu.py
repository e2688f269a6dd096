"""Editing a model of Llama-3-8B's shape on an accelerator: statistics, batches of edits, memory, share of its rate.

    python benchmarks/gpu.py                            the accelerator in use, bfloat16
    python benchmarks/gpu.py --shape tiny --device cpu  the same steps in seconds, as the tests do

The weights are random and are made on the device, so nothing is downloaded: time and memory depend on the shape
alone, except that no request of a random model finishes early. So what is printed is the time of full searches, more
than a trained model needs. The text is random tokens, the facts are the project's own.

The projector takes one eigen-decomposition for each layer; `--random-projector` puts a random basis of the same size
in its place, for a look at the rest alone.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import disable_progress_bars
from measuring import Stopwatch, environment, matrix_rate
from operations import matrix_weights, target_operations
from own_data import own_records
from results import OUTPUT, save, show_table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

from hf_alphaedit import AlphaEditConfig, AlphaEditor
from hf_alphaedit.algorithm.nullspace import SpectralFilter
from hf_alphaedit.contexts import encode_requests
from hf_alphaedit.records import as_record
from hf_alphaedit.statistics import collect_second_moments


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
    "llama-3.2-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 2048, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
}  # fmt: skip
LAYERS = {"llama-3-8b": (4, 5, 6, 7, 8), "llama-3.2-1b": (3, 4, 5, 6, 7), "tiny": (1, 2)}
CONTEXTS = ("The river runs. {}", "Therefore we said so. {}", "Because of it. {}", "I went out. {}", "You see. {}")
SUBSETS = 14  # a random projector protects one of so many directions


def build_model(shape: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A random Llama of this shape, made on the device."""
    config = LlamaConfig(**SHAPES[shape], rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def build_tokenizer(records: list[dict[str, Any]]) -> PreTrainedTokenizerFast:
    """Byte pairs learned from the records, about as long as the words they are for."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    rewrites = [record["requested_rewrite"] for record in records]
    texts = [f"{one['prompt']} {one['subject']} {one['target_new']['str']}" for one in rewrites]
    backend.train_from_iterator([*texts, *CONTEXTS], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False)


def random_filters(editor: AlphaEditor) -> dict[str, SpectralFilter]:
    """Filters of a hard projection that protect a random subspace."""
    filters, gain = {}, editor.config.l2**-0.5
    generator = torch.Generator().manual_seed(0)
    for site in editor.sites():
        width = site.read().shape[1]
        rank = max(1, width // SUBSETS)
        basis = torch.linalg.qr(torch.randn(width, rank, generator=generator).to(site.device)).Q.cpu()  # (d, r)
        filters[site.name] = SpectralFilter(basis, torch.zeros(rank), gain, width - rank)
    return filters


def statistics_operations(editor: AlphaEditor, tokens: int) -> int:
    """Useful operations: every block up to the last edited one for every token, and half of each product k kᵀ.

    Attention's products are left out; at 512 tokens a sequence they are below 3 % of the rest at 8B's shape.
    """
    last = editor.sites()[-1].layer
    blocks = sum(matrix_weights(block) for block in editor.architecture.blocks[: last + 1])
    products = sum(site.read().shape[1] ** 2 for site in editor.sites())
    return tokens * (2 * blocks + products)


def main(arguments: list[str] | None = None) -> int:
    """Run, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", help="default: the accelerator in use, or the CPU where there is none")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=100, help="edits in one batch")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25, help="forward passes of the target search")
    parser.add_argument("--tokens", type=int, default=143360, help="tokens for the statistics")
    parser.add_argument("--random-projector", action="store_true", help="no eigen-decomposition")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder for gpu.json")
    options = parser.parse_args(arguments)
    disable_progress_bars("hf_alphaedit")

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = torch.device(options.device) if options.device else accelerator or torch.device("cpu")
    dtype, watch = getattr(torch, options.dtype), Stopwatch(device)
    raw = own_records(options.batch * options.batches)
    requests, tokenizer = [as_record(record).request for record in raw], build_tokenizer(raw)
    with watch.measuring("model"):
        model = build_model(options.shape, device, dtype)
    config = AlphaEditConfig(
        layers=LAYERS[options.shape], value_steps=options.steps, context_templates=CONTEXTS, cache_targets=False
    )
    editor = AlphaEditor(model, tokenizer, config)
    rate = matrix_rate(dtype, device, size=256 if options.shape == "tiny" else 8192)

    length = min(config.sequence_length, model.config.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(1, model.config.vocab_size, (options.tokens,), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as directory, watch.measuring("statistics"):
        editor._moments = collect_second_moments(  # what `prepare` keeps; it reads texts, and these are tokens
            model, tokenizer, editor.sites(), [text], num_tokens=options.tokens, sequence_length=length,
            base_fingerprint="random", tokenizer_fingerprint="random", corpus_name="random tokens",
            cache_directory=directory,
        )  # fmt: skip
    with watch.measuring("projector"):
        if options.random_projector:
            editor._filters = random_filters(editor)
        editor.filters()

    found: list[dict[str, Any]] = []
    rates = []
    for number in range(options.batches):
        batch = requests[number * options.batch : (number + 1) * options.batch]
        with watch.measuring(f"batch {number + 1}"):
            report = editor.apply_edits(batch)
        encoded = encode_requests(tokenizer, batch, CONTEXTS, config)
        updates = [outcome.steps for outcome in report.outcomes]
        operations = target_operations(
            editor.architecture, encoded, config.layers[-1], updates, config.contexts_in_turn
        )
        rates.append(operations.total / report.seconds["targets"])
        whole = watch.seconds[f"batch {number + 1}"]
        found.append({"edits": len(batch), "seconds": whole, "edits_per_second": len(batch) / whole,
                      "phases": dict(report.seconds)})  # fmt: skip

    shares = {
        "statistics": statistics_operations(editor, editor._moments.tokens) / watch.seconds["statistics"] / rate,
        "targets": max(rates) / rate,
    }
    print(f"{options.shape} in {options.dtype} on {environment(device)['device']}: {rate / 1e12:.3g} TFLOP/s\n")
    rows = [
        (name, seconds, watch.peak.get(name, 0) / 2**30 or None, 100 * shares[name] if name in shares else None)
        for name, seconds in watch.seconds.items()
    ]
    show_table("Phases", ("phase", "seconds", "largest memory, GiB", "share of the rate, %"), rows)
    parts = ("targets", "keys", "solve", "write")
    rows = [
        (f"batch {number}", one["edits_per_second"], *[one["phases"][phase] for phase in parts])
        for number, one in enumerate(found, start=1)
    ]
    show_table("Edits", ("", "edits per second", *[f"{phase}, s" for phase in parts]), rows)
    print(f"target search: {100 * shares['targets']:.0f} % of the rate of matrix products (operations.py)\n")
    command = ["python benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)]
    result = {
        "command": " ".join(command), "environment": environment(device), "shape": SHAPES[options.shape],
        "parameters": sum(parameter.numel() for parameter in model.parameters()), "rate": rate, "shares": shares,
        "seconds": watch.seconds, "peak": watch.peak, "batches": found, "tokens": options.tokens,
        "random_projector": options.random_projector,
    }  # fmt: skip
    print(f"stored in {save('gpu', options.output, result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
