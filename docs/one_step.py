"""One step of prefix-tuning on one page, from texts to the file that decoding reads: python docs/one_step.py"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from gpt2.train_control import PrefixConfig, PrefixTuning
from prefixlib.data.tasks import read_records, training_text

DEMO = Path(__file__).resolve().parents[1] / "data" / "demo"
torch.manual_seed(101)

# The language model stays frozen. The prefix is P = 5 vectors and a network that turns them into keys and values.
tokenizer = AutoTokenizer.from_pretrained(DEMO / "gpt2")
model = AutoModelForCausalLM.from_pretrained(DEMO / "gpt2").requires_grad_(False).eval()
settings = {"preseqlen": 5, "mid_dim": 512, "prefix_dropout": 0.0, "prefix_mode": "activation", "format_mode": "cat"}
prefix = PrefixTuning(PrefixConfig.for_model(model, **settings))
optimizer = torch.optim.AdamW(prefix.parameters(), lr=5e-5, weight_decay=0.0)

# A text is source, separator, target, separator; only the target and the last separator are scored.
records = read_records("webnlg", DEMO / "webnlg_challenge_2017" / "train.json")[:4]
losses = []
for record in records:
    source, target = training_text("webnlg", record.source, record.target, tokenizer.eos_token)
    prompt, continuation = tokenizer(source)["input_ids"], tokenizer(target)["input_ids"]
    keys_and_values = prefix(batch_size=1)  # for every layer (1, H, P, D) twice; the text's positions start at P
    logits = model(torch.tensor([prompt + continuation]), past_key_values=DynamicCache(keys_and_values)).logits[0]
    predictions = logits[len(prompt) - 1 : -1].log_softmax(dim=-1)  # the token at t predicts the one at t + 1
    losses.append(-predictions[range(len(continuation)), continuation].sum())  # nats per text (--objective_mode 1)

loss = torch.stack(losses).mean()
loss.backward()  # through the frozen model into the prefix
torch.nn.utils.clip_grad_norm_(prefix.parameters(), 1.0)
optimizer.step()
save_file({"prefix": prefix.flat().detach()}, "prefix_flat.safetensors")  # (P, 2*L*H*D): the network is not needed
print(f"loss {loss.item():.4f} -> prefix_flat.safetensors")
