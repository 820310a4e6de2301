"""A report read back: its elements, its texts, its data, and the patterns in it."""

from __future__ import annotations

import base64
import json
import math
from html.parser import HTMLParser

import numpy as np
import torch
import zoo

import sat_lens as sl

POSITIONS = 24


class Table:
    """Anything that has a frame."""

    def __init__(self, frame):
        self.table = frame

    def frame(self):
        return self.table


def measured(name="llama", scale=math.inf, ties="exact"):
    model = zoo.model_of(name)
    torch.manual_seed(0)
    ids = torch.randint(3, 96, (1, POSITIONS))
    kwargs = {}
    data = torch.randint(3, 96, (4, POSITIONS))
    if name == "t5":
        kwargs = {"decoder_input": torch.randint(3, 96, (1, 13))}
        data = [{"input": ids, "decoder_input": torch.randint(3, 96, (1, POSITIONS))}]
    roles = sl.head_roles(model, data, progress=False, min_keys=4)
    return roles, sl.run_with_saturation_cache(model, ids, scale=scale, ties=ties, **kwargs)


class Reader(HTMLParser):
    """Collects elements, the text of scripts, and the attributes that could do something."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.elements, self.scripts, self.inside, self.title = [], {}, None, ""
        self.texts = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "title", "style"):
            self.inside = (tag, dict(attrs).get("id", str(len(self.scripts))))

    def handle_endtag(self, tag):
        if self.inside and tag == self.inside[0]:
            self.inside = None

    def handle_data(self, data):
        if self.inside and self.inside[0] in ("script", "style"):
            key = self.inside[1] if self.inside[0] == "script" else "style"
            self.scripts[key] = self.scripts.get(key, "") + data
        elif self.inside:
            self.title = self.title or data  # later ones are the tooltips of drawings
        else:
            self.texts.append(data)


def read(path):
    reader = Reader()
    reader.feed(path.read_text("utf-8"))
    reader.close()
    reader.data = json.loads(reader.scripts["data"])
    return reader


def soft_pattern(packed, causal, queries, keys):
    steps = np.frombuffer(base64.b64decode(packed), np.uint8) / 255
    pattern = np.zeros((queries, keys))
    where = np.tril_indices(queries) if causal else np.indices((queries, keys)).reshape(2, -1)
    pattern[where[0], where[1]] = steps
    return torch.from_numpy(pattern).float()


def saturated_pattern(packed, causal, queries, keys):
    if "bytes" in packed:
        return soft_pattern(packed["bytes"], causal, queries, keys)
    if "bits" in packed:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(packed["bits"]), np.uint8))
        support = torch.from_numpy(bits[: queries * keys].reshape(queries, keys)).float()
    else:
        support = torch.zeros(queries, keys)
        for row, chosen in zip(support, packed["keys"], strict=True):
            row[chosen] = 1
    return support / support.sum(-1, keepdim=True)
