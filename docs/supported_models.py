"""Edit a tiny random model of every causal-LM family of the installed transformers, and write supported-models.md.

    python docs/supported_models.py

Each model is built from its config class with small sizes, three requests are edited in two layers (no projection,
next to no ridge), and the edited model's own forward pass is compared with what the edit should have done.
"""

import sys
import time
import warnings
from collections import defaultdict
from pathlib import Path

import transformers
from transformers.utils import logging


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from families import FAMILIES, UNBUILDABLE, family_model, runs  # noqa: E402
from family_edit import FamilyResult, edit_family, routed_experts  # noqa: E402

from hf_alphaedit.errors import UnsupportedModelError  # noqa: E402
from hf_alphaedit.models.architecture import resolve_architecture  # noqa: E402


OUTPUT = ROOT / "docs" / "supported-models.md"
TOLERANCE = 1e-3
HOW = {
    "adds": "The down-projection's output goes into the residual stream as it is: the published procedure.",
    "multiplies": "It goes there times a factor that is the same for every token: the residual is divided by it.",
    "normalises": "A norm, a gate or the like comes in between. Targets are found at the down-projection's output, "
    "where the write is linear whatever follows, and each layer has its own.",
}

PAGE = """# Supported models

`AlphaEditor` looks at the module tree and at two short rows through the model, never at its name. This page is what
came out for a tiny random model of every causal-LM family in transformers {version}; it was written by
`python docs/supported_models.py`, and `pytest -m slow tests/test_families.py` checks the same.

**{edited} families are edited correctly**: three requests in up to two layers, and the change of the hidden state
that the edited model's own forward pass shows at the last edited layer is the predicted one (relative error below
1e-3 in float32). **{refused} are refused** within seconds, by name and reason. {unbuildable} could not be made small
enough, or need packages that are not installed, and were not tried: {skipped}.

For one model, with its own weights, `hf-alphaedit check MODEL` says the same, and what statistics and edits will cost.

## Edited

{how}

| family | down-projection | block | error |
| --- | --- | --- | --- |
{rows}

## Routed experts

Mixtures of experts with one parameter for all experts, of shape (experts, out, in), that take part in transformers'
experts interface are edited at the experts that the subject's token is sent to; the probe checks that what they return
is the sum of their down-projections by the router's shares. [The method](method.md) tells how. Where no dense or
shared feed-forward is in as many layers, they are what the table above edits. In these {routed} families a dense or
shared one comes first, and `target_module` set to the path below edits the routed experts instead:

| family | routed experts | block | error |
| --- | --- | --- | --- |
{routed_rows}

## Refused

{reasons}

## Where the weights may live

| placement | |
| --- | --- |
| one device, float32, bfloat16, float16 | edited; the update is computed in float32 and float64 and rounded once |
| `device_map`, CPU or disk offload | edited; accelerate's own store is written, a checkpoint in the cache never |
| `accelerate.cpu_offload`, `disk_offload` | edited; load with `device_map` if the model is to be saved |
| `torch.compile`d models | edited through the module that was compiled |
| gradient checkpointing, train mode, `requires_grad=False` | edited; flags are as before on return |
| tied embeddings | edited; ties are kept |
| several processes (`accelerate launch`) | edited; requests are shared out, all processes get the same weights |
| PEFT-wrapped | refused: merge the adapter, or edit the base model first |
| tensor-parallel or fully sharded (DTensor) | refused: load without `tp_plan` or FSDP |
| 4 bits of bitsandbytes | edited; the packed weights are never written, edits run beside them in float32; see below |
| otherwise quantised (8 bits, GPTQ, GGUF, ...) | refused: load in bfloat16, or with `dequantize=True` |

Several processes on CPUs: `ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes 2 SCRIPT`, since
accelerate 1.15 starts one process only for `--cpu --num_processes 2`.

Edits of a 4-bit model leave the process by `export_lora` and `save_edits`; `save_pretrained` refuses while there are
any. Make the `AlphaEditor` before the model runs on a CPU with AVX512-BF16: it keeps bitsandbytes from packing the
weights a second time, for products without gradients. Compile the model after editing it.
"""


def row(family: str, result: FamilyResult) -> str:
    """One line of the table."""
    architecture = result.architecture
    kind = "adds" if architecture.additive else "normalises"
    if architecture.additive and architecture.scale != 1:
        kind = f"multiplies by {architecture.scale:.3g}"
    return f"| {family} | `{architecture.target_module}` | {kind} | {result.error:.0e} |"


def main() -> None:
    """Try every family and write the page."""
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    rows: list[str] = []
    routed_rows: list[str] = []
    refused: dict[str, list[str]] = defaultdict(list)
    failed: list[str] = []
    skipped = set(UNBUILDABLE)
    for family in FAMILIES:
        if family in UNBUILDABLE:
            continue
        began = time.perf_counter()
        model = family_model(family)
        if not runs(model):
            skipped.add(family)
            continue
        try:
            resolve_architecture(model)
        except UnsupportedModelError as error:
            refused[str(error)].append(family)
            print(f"{family}: refused: {error}", flush=True)
            continue
        for target, table in ((None, rows), (routed_experts(resolve_architecture(model)), routed_rows)):
            if target is None and table is routed_rows:
                continue
            try:
                result = edit_family(family_model(family), target_module=target)
            except Exception as error:  # noqa: BLE001 - all are shown at the end
                failed.append(f"{family}: {type(error).__name__}: {error}")
                continue
            if not result.error < TOLERANCE:
                failed.append(f"{family}: relative error {result.error:.1e}")
                continue
            table.append(row(family, result))
            print(f"{table[-1]} {time.perf_counter() - began:.1f} s", flush=True)
    if failed:
        raise SystemExit("\n".join(failed))
    reasons = "\n".join(f"- {', '.join(families)}: {reason}" for reason, families in sorted(refused.items()))
    OUTPUT.write_text(
        PAGE.format(
            version=transformers.__version__,
            edited=len(rows),
            refused=sum(map(len, refused.values())),
            unbuildable=len(skipped),
            skipped=", ".join(sorted(skipped)),
            how="\n".join(f"- *{kind}*: {text}" for kind, text in HOW.items()),
            rows="\n".join(rows),
            reasons=reasons,
            routed=len(routed_rows),
            routed_rows="\n".join(routed_rows),
        ),
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
