"""Load a checkpoint as a stranger would, with transformers alone, and classify texts.

usage: python scripts/load_and_predict.py CHECKPOINT TEXT...
"""

import sys

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


checkpoint, *texts = sys.argv[1:]
model = AutoModelForSequenceClassification.from_pretrained(checkpoint, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
with torch.no_grad():
    probabilities = model(**tokenizer(texts, padding=True, truncation=True, return_tensors="pt")).logits.softmax(-1)
for text, row in zip(texts, probabilities, strict=True):
    best = row.argmax().item()
    print(f"{text}  ->  {model.config.id2label[best]} ({row[best]:.0%})")
