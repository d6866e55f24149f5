"""Handler of the small transformer: the body's bytes are its tokens; it answers with a class and its probability."""

from typing import Any

import torch
from ts.torch_handler.base_handler import BaseHandler as Base

TOKENS = 128  # sequence length; shorter texts are padded with zeros, longer ones cut


class TransformerHandler(Base):  # type: ignore[misc]
    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        rows = []
        for row in data:
            body = row.get("body") or row.get("data") or b""
            text = body.encode() if isinstance(body, str) else bytes(body)
            rows.append(list(text[:TOKENS].ljust(TOKENS, b"\0")))
        return torch.tensor(rows)

    def postprocess(self, data: torch.Tensor) -> list[dict[str, float]]:
        probabilities, classes = data.softmax(dim=1).max(dim=1)
        return [
            {"class": int(number), "probability": float(probability)}
            for number, probability in zip(classes, probabilities, strict=True)
        ]
