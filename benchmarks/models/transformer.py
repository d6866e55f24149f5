"""Handler of the small transformer: the body's bytes are its tokens; it answers with a class and its probability."""

import torch
from ts.torch_handler.base_handler import BaseHandler as Base

TOKENS = 128  # sequence length; shorter texts are padded with zeros, longer ones cut


class TransformerHandler(Base):
    def preprocess(self, data):
        rows = []
        for row in data:
            body = row.get("body") or row.get("data") or b""
            text = body.encode() if isinstance(body, str) else bytes(body)
            rows.append(list(text[:TOKENS].ljust(TOKENS, b"\0")))
        return torch.tensor(rows)

    def postprocess(self, data):
        probabilities, classes = data.softmax(dim=1).max(dim=1)
        return [
            {"class": int(number), "probability": float(probability)}
            for number, probability in zip(classes, probabilities, strict=True)
        ]
