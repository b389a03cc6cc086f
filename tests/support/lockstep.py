"""Many sampling runs side by side, their network calls joined to one batch. Not a test.

A small network costs as much for one picture as for ten. Every run is a thread that waits in its call of the
network; when all that still run wait, their inputs go through the network as one batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""network(x [B, ...], t [B], text [B, ...]) -> output [B, ...]."""


def run_together(runs: Sequence[Callable[[Network], Tensor]], network: Network) -> list[Tensor]:
    """Each run's result, in order; the first error of a run is raised here."""
    turn = threading.Condition()
    questions: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    answers: dict[int, Tensor] = {}
    results: dict[int, Tensor] = {}
    errors: dict[int, BaseException] = {}

    def work(index: int) -> None:
        def call(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
            with turn:
                questions[index] = (x, t, text)
                turn.notify_all()
                turn.wait_for(lambda: index in answers)
                return answers.pop(index)

        try:
            results[index] = runs[index](call)
        except BaseException as error:
            errors[index] = error
        with turn:
            turn.notify_all()

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(runs))]
    for thread in threads:
        thread.start()
    while True:
        with turn:
            turn.wait_for(lambda: bool(errors) or len(questions) + len(results) == len(runs))
            if errors:
                raise errors[min(errors)]
            if not questions:
                break
            order = sorted(questions)
            inputs = [questions.pop(index) for index in order]
            batch = [torch.cat(parts) for parts in zip(*inputs, strict=True)]
            with torch.no_grad():
                output = network(*batch)
            answers.update(zip(order, output.split([len(x) for x, _, _ in inputs]), strict=True))
            turn.notify_all()
    return [results[i] for i in range(len(runs))]
