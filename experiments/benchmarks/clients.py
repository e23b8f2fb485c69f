"""Trained networks for the other benchmarks: one client's local training, without any federation.

Each network is trained by the very code that a simulated client runs (:meth:`fedmerge.tasks.ClientTask.train`), from
its own initialisation on its own partition, and kept as safetensors, so that a second run reads it back.
"""

import re
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmerge.tasks import ClientTask

TASK = ClientTask(
    dataset="cifar10", clients=4, model="vgg11", public_fraction=0.1, val_fraction=0.05, local_epochs=6, device="auto"
)
"""What the networks are trained on that alignment is measured with."""


def path_of(folder: Path, task: ClientTask, client: int) -> Path:
    """Where the network of one client is kept: every number that shapes it is in the name."""
    parts = (
        task.dataset, task.model, f"w{task.width:g}", f"{task.partition}{task.clients}", f"i{task.client_images}",
        f"p{task.public_fraction:.4g}", f"v{task.val_fraction:.4g}", f"e{task.local_epochs}", task.init,
        f"s{task.seed}", f"c{client}",
    )  # fmt: skip
    return folder / (re.sub(r"[^\w.-]", "_", "-".join(parts)) + ".safetensors")


def trained(
    folder: Path, task: ClientTask, clients: range, say: Callable[[str], None] = print
) -> list[dict[str, Tensor]]:
    """The networks of ``clients`` after round 1, read from ``folder`` or trained and written there."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for client in clients:
        path = path_of(folder, task, client)
        if not path.is_file():
            result, examples = task.train(client, task.network().state_dict())
            part = path.with_suffix(".part")
            save_file({name: tensor.contiguous() for name, tensor in result.params.items()}, part)
            part.replace(path)
            say(
                f"trained {path.name}: {examples} images, {task.local_epochs} epochs, {result.seconds:.0f} s, "
                f"training accuracy {result.accuracies[-1]:.3f}"
            )
        found.append(load_file(path))
    return found
