"""PyTorch's usual recipe for truncated backpropagation, measured in this process.

`benchmarks.training` and `benchmarks.sampled_softmax` run this script with a task as JSON. The
script needs only `torch` and `numpy`.

The recipe is the one that tutorials copy (after ksopyla's `lstm_imdb_tbptt.py`). Words come from
`lower().split()`, and the most frequent ones are the vocabulary. A batch holds documents of similar
length, padded. It is split every K steps. The state is detached and carried to the next window, and
every window has a loss and an Adam step. The recipe also runs over the padding, in training and in
evaluation. With the loss at the last window alone, the windows before it run under `torch.no_grad`.
"""

from __future__ import annotations

import collections
import json
import random
import sys
import time
from typing import Any

import numpy as np
import torch

WARM_WINDOWS = 20  # before the clock starts
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Classifier(torch.nn.Module):
    def __init__(self, task: dict[str, Any]):
        super().__init__()
        self.embedding = torch.nn.Embedding(task["vocab_size"], task["embedding"])
        self.dropout = torch.nn.Dropout(0.1)
        self.lstm = torch.nn.LSTM(task["embedding"], task["units"])
        self.head = torch.nn.Linear(task["units"], 2)

    def forward(self, words: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        outputs, state = self.lstm(self.dropout(self.embedding(words)), state)
        return self.head(self.dropout(outputs[-1])), state


def layer_alone(task: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a forward and backward pass of the layer alone, over one window."""
    layer = getattr(torch.nn, task["cell"])(task["embedding"], task["units"]).to(DEVICE)
    sizes = task["window"], task["lanes"], task["embedding"]
    x = torch.randn(*sizes, requires_grad=True, device=DEVICE)
    zeros = torch.zeros(1, task["lanes"], task["units"], device=DEVICE)
    state = (zeros, zeros) if task["cell"] == "LSTM" else zeros

    def step() -> None:
        layer.zero_grad()
        x.grad = None
        layer(x, state)[0][-1].sum().backward()
        _wait()

    times = []
    for _ in range(task["calls"]):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return {"ms": 1_000 * float(np.median(times[2:]))}


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _documents(task: dict[str, Any]) -> tuple[list[torch.Tensor], torch.Tensor]:
    data = np.load(task["ids"])
    documents = np.split(data["ids"], data["offsets"][1:-1])
    labels = torch.from_numpy(data["labels"].astype("int64")).to(DEVICE)
    return [torch.from_numpy(d.astype("int64")) for d in documents], labels


def reviews(task: dict[str, Any]) -> dict[str, float]:
    """Real tokens per second in an epoch over documents of ids."""
    documents, labels = _documents(task)
    train = Trainer(task)
    began = time.perf_counter()
    train.epoch(documents[: task["lanes"]], labels)
    _wait()
    warm = time.perf_counter()
    train.epoch(documents, labels)
    _wait()
    seconds = time.perf_counter() - warm
    return {"tokens_per_second": sum(map(len, documents)) / seconds, "first_seconds": warm - began}


def evaluation(task: dict[str, Any]) -> dict[str, float]:
    """Seconds of the accuracy on all documents, after that on a few."""
    documents, labels = _documents(task)
    trainer = Trainer(task)
    trainer.accuracy(documents[: task["lanes"]], labels)
    began = time.perf_counter()
    trainer.accuracy(documents, labels)
    return {"evaluation_seconds": time.perf_counter() - began}


class LanguageModel(torch.nn.Module):
    def __init__(self, task: dict[str, Any]):
        super().__init__()
        units = task["units"]
        self.dropout = torch.nn.Dropout(0.2)
        self.embedding = torch.nn.Embedding(task["vocab_size"], units)
        self.lstm = torch.nn.LSTM(units, units, task["layers"], dropout=0.2)
        self.head = torch.nn.Linear(units, task["vocab_size"])

    def forward(self, words: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
        outputs, state = self.lstm(self.dropout(self.embedding(words)), state)
        logits = self.head(self.dropout(outputs)).view(-1, self.head.out_features)
        return torch.nn.functional.log_softmax(logits, dim=1), state


def language_model(task: dict[str, Any]) -> dict[str, float]:
    """Words a second of training, by the recipe of PyTorch's examples: word_language_model."""
    lanes, window, rate = task["lanes"], task["window"], 20.0
    ids = torch.from_numpy(np.load(task["words"]).astype("int64")).to(DEVICE)
    ids = ids[: len(ids) // lanes * lanes].view(lanes, -1).t().contiguous()
    model, loss = LanguageModel(task).to(DEVICE), torch.nn.NLLLoss()
    model.train()
    state = None
    words = 0
    began = 0.0
    for i, place in enumerate(range(0, len(ids) - 1, window)):
        if i == WARM_WINDOWS:
            _wait()
            began, words = time.perf_counter(), 0
        length = min(window, len(ids) - 1 - place)
        inputs, targets = ids[place : place + length], ids[place + 1 : place + 1 + length]
        model.zero_grad()
        if state is not None:
            state = tuple(part.detach() for part in state)
        output, state = model(inputs, state)
        loss(output, targets.reshape(-1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.25)
        with torch.no_grad():
            for weights in model.parameters():
                weights.add_(weights.grad, alpha=-rate)
        words += length * lanes
    _wait()
    return {"tokens_per_second": words / (time.perf_counter() - began)}


class SampledLanguageModel(torch.nn.Module):
    """Rows of both tables have sparse gradients, which `SparseAdam` takes."""

    def __init__(self, task: dict[str, Any]):
        super().__init__()
        words, units = task["vocab_size"], task["units"]
        self.embedding = torch.nn.Embedding(words, task["embedding"], sparse=True)
        self.lstm = torch.nn.LSTM(task["embedding"], units)
        self.kernel = torch.nn.Embedding(words, units, sparse=True)
        self.bias = torch.nn.Embedding(words, 1, sparse=True)
        torch.nn.init.xavier_uniform_(self.kernel.weight)
        torch.nn.init.zeros_(self.bias.weight)
        self.words, self.draws = words, task["draws"]

    def log_chance(self, words: torch.Tensor) -> torch.Tensor:
        """The log of the probability that a word is in the sample."""
        once = torch.log1p(1 / (words.double() + 1)) / np.log(self.words + 1.0)
        return torch.log(-torch.expm1(self.draws * torch.log1p(-once))).float()

    def forward(self, words: torch.Tensor, targets: torch.Tensor, state: Any) -> tuple:
        """The loss over the target and a log-uniform sample of distinct words, and the state."""
        hidden, state = self.lstm(self.embedding(words), state)
        hidden, targets = hidden.flatten(0, 1), targets.reshape(-1)
        uniform = torch.rand(self.draws, dtype=torch.float64)
        drawn = (torch.exp(uniform * np.log(self.words + 1.0)) - 1).long()
        sample = torch.unique(drawn.clamp_(max=self.words - 1))
        target = (hidden * self.kernel(targets)).sum(1) + self.bias(targets)[:, 0]
        target = target - self.log_chance(targets)
        shift = self.bias(sample)[:, 0] - self.log_chance(sample)
        logits = torch.addmm(shift, hidden, self.kernel(sample).t())
        logits = logits.masked_fill(targets[:, None] == sample, -1e9)
        logits = torch.cat([target[:, None], logits], 1)
        zeros = torch.zeros(len(logits), dtype=torch.long)
        return torch.nn.functional.cross_entropy(logits, zeros), state


def sampled_softmax(task: dict[str, Any]) -> dict[str, float]:
    """Words a second of a language model with a sampled softmax, after some windows."""
    lanes, window = task["lanes"], task["window"]
    ids = torch.from_numpy(np.load(task["words"]).astype("int64"))
    ids = ids[: len(ids) // lanes * lanes].view(lanes, -1).t().contiguous()
    model = SampledLanguageModel(task)
    tables = [*model.embedding.parameters(), *model.kernel.parameters(), *model.bias.parameters()]
    optimizers = [
        torch.optim.SparseAdam(tables),
        torch.optim.Adam(model.lstm.parameters()),
    ]
    state, words, began = None, 0, 0.0
    places = range(0, len(ids) - window, window)
    for i, place in enumerate([*places, *places]):
        if i == len(places):
            began, words = time.perf_counter(), 0
        if state is not None:
            state = tuple(part.detach() for part in state)
        model.zero_grad()
        inputs, targets = ids[place : place + window], ids[place + 1 : place + 1 + window]
        loss, state = model(inputs, targets, state)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        words += window * lanes
    return {"tokens_per_second": words / (time.perf_counter() - began)}


def accuracy(task: dict[str, Any]) -> dict[str, Any]:
    """Trains from raw strings until an epoch's test accuracy reaches the target."""
    with open(task["texts"], encoding="utf-8") as file:
        splits = json.load(file)
    (train, train_labels), (test, test_labels) = splits["train"], splits["test"]
    train, test = ([text.lower().split() for text in texts] for texts in (train, test))
    counts = collections.Counter(word for text in train for word in text)
    common = [word for word, count in counts.most_common(task["vocab_size"] - 2) if count >= 10]
    ids = {word: 2 + i for i, word in enumerate(common)}  # 0 pads, 1 is unknown
    train, test = (
        [torch.tensor([ids.get(word, 1) for word in text]) for text in texts]
        for texts in (train, test)
    )
    train_labels = torch.tensor(train_labels, device=DEVICE)
    test_labels = torch.tensor(test_labels, device=DEVICE)
    trainer, epochs = Trainer(task), []
    for _ in range(task["epochs"]):
        trainer.epoch(train, train_labels)
        epochs.append(trainer.accuracy(test, test_labels))
        if epochs[-1] >= task["target"]:
            break
    return {"accuracy": epochs[-1], "epochs": epochs}


class Trainer:
    def __init__(self, task: dict[str, Any]):
        self.window, self.lanes = task["window"], task["lanes"]
        self.final_only = task["window_loss"] == "final_only"
        self.model = Classifier(task).to(DEVICE)
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.loss = torch.nn.CrossEntropyLoss()

    def batches(self, documents: list[torch.Tensor], shuffle: bool) -> list[list[int]]:
        order = list(range(len(documents)))
        if shuffle:
            random.shuffle(order)
        found = []
        for begin in range(0, len(order), 100 * self.lanes):
            pool = sorted(order[begin : begin + 100 * self.lanes], key=lambda i: -len(documents[i]))
            found += [pool[i : i + self.lanes] for i in range(0, len(pool), self.lanes)]
        if shuffle:
            random.shuffle(found)
        return found

    def padded(self, documents: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(documents).to(DEVICE)

    def epoch(self, documents: list[torch.Tensor], labels: torch.Tensor) -> None:
        self.model.train()
        for batch in self.batches(documents, shuffle=True):
            words = self.padded([documents[i] for i in batch])
            state = None
            *others, last = words.split(self.window)
            if self.final_only:
                with torch.no_grad():
                    for window in others:
                        state = self.model(window, state)[1]
                others = []
            for window in (*others, last):
                self.model.zero_grad()
                predicted, state = self.model(window, state)
                self.loss(predicted, labels[batch]).backward()
                self.optimizer.step()
                state = tuple(part.detach() for part in state)

    def accuracy(self, documents: list[torch.Tensor], labels: torch.Tensor) -> float:
        self.model.eval()
        right = 0
        with torch.no_grad():
            for batch in self.batches(documents, shuffle=False):
                words = self.padded([documents[i] for i in batch])
                predicted = self.model(words, None)[0].argmax(1)
                right += int((predicted == labels[batch]).sum())
        return right / len(documents)


def main() -> None:
    task = json.loads(sys.argv[1])
    random.seed(task["seed"])
    torch.manual_seed(task["seed"])
    parts = {
        "lstm": layer_alone,
        "gru": layer_alone,
        "reviews": reviews,
        "final_only": reviews,
        "evaluation": evaluation,
        "accuracy": accuracy,
        "language_model": language_model,
        "sampled_softmax": sampled_softmax,
    }
    with torch.autocast(DEVICE, torch.bfloat16, enabled=task["way"].endswith("autocast")):
        found = parts[task["part"]](task)
    with open("/proc/self/status", encoding="utf-8") as status:
        found["peak_mb"] = int(status.read().split("VmHWM:")[1].split()[0]) / 2**10
    print(json.dumps(found))


if __name__ == "__main__":
    main()
