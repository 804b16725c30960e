"""Rows of tokens to batches, and whether the documents packed in a row see each other.

Legend: `S` rows, `T` tokens of each, `B` rows of a batch.
"""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from losa.data.blocks import Packed, Samples
from losa.loss import IGNORED


class Rows(Dataset[dict[str, Any]]):
    """Training rows: packed blocks `(S, T)`, with what counts in them, or samples of their own lengths."""

    def __init__(self, rows: Tensor | Packed | Samples) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        return {"input_ids": row} if isinstance(row, Tensor) else row


def collate(rows: list[dict[str, Any]], eos: int | None = None) -> dict[str, Tensor]:
    """Stacks rows. Shorter ones are padded on the right, with no loss and no attention there.

    Packed rows hold several documents, each ended by `eos`, or begun where a row says that it `starts`. Positions start again
    with every document: transformers then lets no token attend to another document, and none is predicted from one.
    """
    ids = [torch.as_tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    labels = [torch.as_tensor(row.get("labels", row["input_ids"]), dtype=torch.int64) for row in rows]
    labels_BT = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(i) for i in ids])
    if (lengths != input_ids.shape[1]).any():
        real = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return {"input_ids": input_ids, "labels": labels_BT, "attention_mask": real.long()}
    starts = torch.zeros_like(input_ids, dtype=torch.bool)
    if "starts" in rows[0]:
        starts[:, 1:] = torch.stack([row["starts"] for row in rows])[:, 1:]  # a row's first token has place 0 in any case
    elif eos is not None:
        starts[:, 1:] = input_ids[:, :-1] == eos
    batch = {"input_ids": input_ids, "labels": labels_BT.masked_fill(starts, IGNORED)}
    if starts.any():  # without positions, attention takes the faster path of whole rows
        place = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        batch["position_ids"] = place - place.where(starts, 0).cummax(1).values
    return batch


@torch.no_grad()
def separates_documents(model: PreTrainedModel) -> bool:
    """Whether positions that start again keep a document from seeing the one before it in its row. Most families do that, some
    (OPT) do not; found by changing a token of one document and looking at the logits of the next."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    device = model.get_input_embeddings().weight.device
    ids = torch.zeros(2, 8, dtype=torch.int64, device=device)
    ids[1, 0] = 1
    positions = torch.arange(4, device=device).repeat(2).expand(2, 8)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits.float()
    change = (logits[0] - logits[1]).abs()
    return bool(change[4:].max() <= 1e-3 * change[:4].max())
