"""General ability by lm-eval's own tasks and code (the extra `lm-eval`)."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_alphaedit.evaluation.report import Estimate
from hf_alphaedit.models.hooks import inference_state


# lm-eval gives these as shares; here they are percentages, as everywhere in a report.
SHARES = ("acc", "acc_norm", "acc_mutual_info", "exact_match", "em", "f1")
NORMAL_QUANTILE = 1.96
BOOTSTRAP_ITERATIONS = 1000  # for metrics without a standard error in closed form


def run_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | str = "auto",
    include_path: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Run tasks of the lm-eval package on the model as it is in memory.

    lm-eval writes a pad token into the tokenizer, so it gets a copy, and would seed the global random states, which it
    is kept from. They and the model's modes are as before on return.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; a copy is used.
        tasks: names that lm-eval knows.
        num_fewshot: examples in each prompt; None leaves it to the task.
        limit: only so many documents of each task.
        batch_size: as lm-eval takes it.
        include_path: a folder with further task files.
        seed: for the choice of examples.

    Returns:
        "task/metric" -> estimate with an interval of 1.96 of lm-eval's standard errors (0 wide where it has none).

    Raises:
        ModuleNotFoundError: lm-eval isn't installed.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    state = random.getstate()  # lm-eval draws a name for its run from it
    try:
        with inference_state(model):
            wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            output = simple_evaluate(
                model=wrapped, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, task_manager=manager,
                log_samples=False, bootstrap_iters=BOOTSTRAP_ITERATIONS, random_seed=None, numpy_random_seed=None,
                torch_random_seed=None, fewshot_random_seed=seed,
            )  # fmt: skip
    finally:
        random.setstate(state)
    return {
        f"{task}/{metric}": result
        for task, values in output["results"].items()
        for metric, result in _estimates(values, output["n-samples"].get(task, {}).get("effective", 0)).items()
    }


def _estimates(values: dict, count: int) -> dict[str, Estimate]:
    """From lm-eval's flat mapping, whose keys are "metric,filter" and "metric_stderr,filter"."""
    result = {}
    for key, value in values.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = values.get(f"{metric}_stderr,{chosen}")
        spread = NORMAL_QUANTILE * error if isinstance(error, (int, float)) else 0.0
        scale = 100 if metric in SHARES else 1
        name = metric if chosen == "none" else f"{metric},{chosen}"
        result[name] = Estimate(scale * value, scale * (value - spread), scale * (value + spread), count)
    return result
