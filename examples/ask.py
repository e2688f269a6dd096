"""Ask a checkpoint: continue prompts greedily with transformers alone. Usage: python ask.py DIRECTORY PROMPT..."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


NEW_TOKENS = 8


def main(directory: str, *prompts: str) -> None:
    """Print the continuations of `prompts` as a JSON list."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    continuations = []
    for prompt in prompts:
        encoded = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            tokens = model.generate(
                **encoded, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
        new = tokens[0, encoded["input_ids"].shape[1] :]
        continuations.append(tokenizer.decode(new, skip_special_tokens=True))
    print(json.dumps(continuations))


if __name__ == "__main__":
    main(*sys.argv[1:])
