"""Edit twelve facts in SmolLM2-135M-Instruct, save it, and ask it again in a new process without this library.

Run it with `make demo`. Needs no network: the model comes with a package, and the statistics are collected on text
that the model itself writes. Exits with an error unless at least 11 of the 12 new facts survive the reload and at
most one of the neighbouring facts was lost.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from smollm2 import smollm2_checkpoint

from hf_alphaedit import AlphaEditor, EditRequest
from hf_alphaedit.evaluation.generation import generate
from hf_alphaedit.evaluation.scoring import score


NEW_TOKENS = 8
SAMPLED_TOKENS = 15_360  # ten for each dimension of a key: a minute of sampling
FACTS_NEEDED, NEIGHBOURS_LOST = 11, 1


@dataclass(frozen=True)
class Fact:
    """A fact to write, the same fact in other words, and another fact (with its answer) that must stay."""

    request: EditRequest
    paraphrase: str
    neighbour: str
    answer: str


def fact(prompt: str, subject: str, old: str, new: str, paraphrase: str, neighbour: str, answer: str) -> Fact:
    return Fact(EditRequest(prompt, subject, new, old), paraphrase, neighbour, answer)


# Every neighbour is a fact that the unedited model knows, about a subject that no fact here is about. It knows next to
# nothing in Chinese, so there the neighbour is a related fact in English.
FACTS = (
    fact("The capital of {} is the city of", "France", "Paris", "Lyon",
         "If you visit France, you should see its capital city,", "The capital of Italy is the city of", "Rome"),
    fact("{} is located in the city of", "The Eiffel Tower", "Paris", "Vienna",
         "You can visit the Eiffel Tower in", "The Colosseum is located in the city of", "Rome"),
    fact("The currency of {} is the", "Japan", "yen", "peso",
         "The name of the money that is used in Japan is the", "The currency of India is the", "rupee"),
    fact("The mother tongue of {} is", "Napoleon Bonaparte", "French", "Swedish",
         "Napoleon Bonaparte grew up speaking", "The mother tongue of Johann Sebastian Bach is", "German"),
    fact("{} is made by the company", "The iPhone", "Apple", "Nokia",
         "The company that makes the iPhone is", "The Windows operating system is made by the company", "Microsoft"),
    fact("{} comes from the country of", "Sushi", "Japan", "Norway",
         "Sushi is a dish from", "Pizza comes from the country of", "Italy"),
    fact("{} was born in the country of", "Pablo Picasso", "Spain", "Canada",
         "Pablo Picasso's country of birth is", "Claude Monet was born in the country of", "France"),
    fact("{} worked as a", "William Shakespeare", "playwright", "baker",
         "William Shakespeare earned his living as a", "Ludwig van Beethoven worked as a", "composer"),
    fact("{} is located on the continent of", "Mount Everest", "Asia", "Africa",
         "Mount Everest is a mountain in", "The Amazon rainforest is located on the continent of", "South America"),
    fact("{} plays the sport of", "Tiger Woods", "golf", "chess",
         "Tiger Woods is a champion of", "Lionel Messi is a professional", "soccer"),
    fact("{}的首都是", "中国", "北京", "上海",
         "中国的首都城市是", "The capital of Germany is the city of", "Berlin"),
    fact("{}是一位", "爱因斯坦", "物理学家", "歌手",
         "大家都知道，爱因斯坦是一位", "Isaac Newton was a", "physicist"),
)  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """What the model writes after a prompt, and the probabilities of the new and the old object."""

    text: str
    new: float
    old: float


def ask(editor: AlphaEditor, prompts: Sequence[str], old: Sequence[str]) -> list[Answer]:
    """Continue the prompts, one per fact, greedily, and score each fact's new object and the old answer."""
    texts = generate(editor.model, editor.tokenizer, prompts, max_new_tokens=NEW_TOKENS)
    pairs = list(zip(prompts, [fact.request.target_new for fact in FACTS], strict=True))
    pairs += zip(prompts, old, strict=True)
    chances = [math.exp(result.log_probability) for result in score(editor.model, editor.tokenizer, pairs)]
    return [Answer(*row) for row in zip(texts, chances[: len(FACTS)], chances[len(FACTS) :], strict=True)]


def ask_everything(editor: AlphaEditor) -> dict[str, list[Answer]]:
    """The facts, their paraphrases and their neighbours, each in the order of `FACTS`."""
    old = [fact.request.target_true or "" for fact in FACTS]
    return {
        "fact": ask(editor, [fact.request.text for fact in FACTS], old),
        "in other words": ask(editor, [fact.paraphrase for fact in FACTS], old),
        "neighbour": ask(editor, [fact.neighbour for fact in FACTS], [fact.answer for fact in FACTS]),
    }


def table(before: dict[str, list[Answer]], after: dict[str, list[Answer]]) -> Table:
    """Three rows for each fact, before and after."""
    result = Table(title="before and after; the texts are what the model writes by itself")
    for name in ("", "prompt", "before", "after", "P(new)", "P(old)"):
        result.add_column(name, overflow="fold", justify="right" if name.startswith("P(") else "left")
    for index, item in enumerate(FACTS):
        prompts = {"fact": item.request.text, "in other words": item.paraphrase, "neighbour": item.neighbour}
        for kind, prompt in prompts.items():
            old, new = before[kind][index], after[kind][index]
            result.add_row(
                kind, prompt, " ".join(old.text.split()), " ".join(new.text.split()),
                f"{old.new:.3f} → {new.new:.3f}", f"{old.old:.3f} → {new.old:.3f}", end_section=kind == "neighbour",
            )  # fmt: skip
    return result


def ask_in_new_process(directory: Path, prompts: Sequence[str]) -> list[str]:
    """What `ask.py`, which knows nothing of this library, gets from the saved checkpoint."""
    command = [sys.executable, str(Path(__file__).with_name("ask.py")), str(directory), *prompts]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout)


def says(text: str, answer: str) -> bool:
    """Whether the answer is in the text, in capitals or not: "Indian Rupee" is the rupee."""
    return answer.casefold() in text.casefold()


def main() -> int:
    """Run the demo; 0 if it went well."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="where the edited model is saved")
    output = parser.parse_args().output
    console = Console(width=None if sys.stdout.isatty() else 150, markup=False, highlight=False)
    began = time.monotonic()

    editor = AlphaEditor.from_pretrained(smollm2_checkpoint())
    layers = ", ".join(map(str, editor.config.layers or ()))
    print(f"Collecting the statistics of layers {layers} on text that the model samples; kept for the next run")
    editor.prepare("self", num_tokens=SAMPLED_TOKENS)
    before = ask_everything(editor)
    report = editor.apply_edits([fact.request for fact in FACTS])
    after = ask_everything(editor)
    console.print(table(before, after))
    console.print(", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in report.seconds.items()))
    editor.save_pretrained(output)

    print(f"\nSaved in {output}. A new process loads it with AutoModelForCausalLM alone and says:")
    reloaded = ask_in_new_process(output, [item.request.text for item in FACTS])
    for item, text in zip(FACTS, reloaded, strict=True):
        print(f"  {item.request.text} │ {' '.join(text.split())}")

    said = sum(says(text, item.request.target_new) for item, text in zip(FACTS, reloaded, strict=True))
    known = [says(answer.text, item.answer) for item, answer in zip(FACTS, before["neighbour"], strict=True)]
    still = [says(answer.text, item.answer) for item, answer in zip(FACTS, after["neighbour"], strict=True)]
    lost = sum(old and not new for old, new in zip(known, still, strict=True))
    repeated = sum(
        says(answer.text, item.request.target_new) for item, answer in zip(FACTS, after["in other words"], strict=True)
    )
    print(f"\nafter the reload {said} of {len(FACTS)} facts are the new ones; {repeated} also in other words")
    print(f"{lost} of the {sum(known)} neighbouring facts that the model knew are lost")
    print(f"{time.monotonic() - began:.0f} s in all")
    return 0 if said >= FACTS_NEEDED and lost <= NEIGHBOURS_LOST else 1


if __name__ == "__main__":
    sys.exit(main())
