"""CIFAR-10 in minutes: `alexprep train --recipe cifar10-fast` beside a plain torch script of the same net that has as much CPU time.

    python benchmarks/cifar_fast.py DATA [--seeds 0 1] [--threads 2] [--precision bf16] [--save]    DATA: CIFAR-10, `alexprep shard --size 32` and `pca-stats`

Of alexprep all counts, from the start of the command on: imports, an evaluation after the last epoch, checkpoints, and `alexprep eval --views two`
at the end. The script (`plain` below) has all images in memory, sees crops of one side throughout, those of the recipe's last epochs, evaluates once, at the end, over an image
and its reflection at that side, and its rate falls with the CPU time that it has used, to end when alexprep's is used up. They take turns; CPU seconds are those of all
threads and child processes, which sleep while they wait for one another, unless OMP_WAIT_POLICY says otherwise: spinning is no work, but takes a quarter more CPU time
beside other programs, and changes no bit. bf16 pays on processors with AMX: on one with AVX-512 BF16 alone, convolutions of this net take 1.8
times as long in it as in float32.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from common import command_line, report

ME = Path(__file__).resolve()


def plain(data: Path, cpu_seconds: float, seed: int, half: bool) -> dict[str, Any]:
    """A training script as one writes it for one's own use, of the net and with the optimizer's numbers of `cifar10-fast`."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from PIL import Image

    from alexprep.train.models.cifar import cifar10_fast_net
    from alexprep.train.recipes import RECIPES

    def read(split: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = [], []
        for shard in sorted((data / split).glob("*.tar")):
            with tarfile.open(shard) as tar:
                for member in tar:
                    contents = tar.extractfile(member).read()  # type: ignore[union-attr]
                    if member.name.endswith(".cls"):
                        labels.append(int(contents))
                    else:
                        images.append(np.asarray(Image.open(io.BytesIO(contents))))
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)

    rule = RECIPES["cifar10-fast"]
    crop, warm = rule.crop, 1 / rule.epochs  # it warms up for an epoch
    batch, peak, momentum, decay = rule.batch_size, rule.lr, rule.momentum, rule.decay
    smoothing, bias_factor = rule.label_smoothing, rule.bias_lr_factor
    torch.manual_seed(seed)
    (images, labels), (test_images, test_labels) = read("train"), read("test")
    mean, std = images.float().mean((0, 1, 2)), images.float().std((0, 1, 2))
    images, test_images = ((each - mean) / std for each in (images, test_images))
    net = cifar10_fast_net(10, crop, seed=seed)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    biases = {name for name, _ in net.named_parameters() if name.endswith("bias")}
    norms = {name for name, each in net.named_parameters() if each.dim() == 1} - biases
    weights = {name for name, _ in net.named_parameters()} - biases - norms
    groups = [
        {"params": [net.get_parameter(name) for name in sorted(names)], "weight_decay": shrink, "factor": factor}
        for names, shrink, factor in ((weights, decay, 1.0), (norms, 0.0, 1.0), (biases, 0.0, bias_factor))
    ]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=momentum, nesterov=True)
    window, steps, used = torch.arange(crop), 0, 0.0
    while used < 1:
        order = torch.randperm(len(images))
        for rows in torch.split(order, batch):
            used = cpu() / cpu_seconds
            if used >= 1 or len(rows) < 2:
                break
            tops, lefts = torch.randint(0, 32 - crop + 1, (2, len(rows), 1))
            columns = lefts + torch.where(torch.rand(len(rows), 1) < 0.5, window, window.flip(0))
            crops = images[rows[:, None, None], (tops + window)[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
            for group in optimizer.param_groups:
                group["lr"] = group["factor"] * peak * min(used / warm, (1 - used) / (1 - warm))
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                outputs = net(crops)
            F.cross_entropy(outputs.float(), labels[rows], label_smoothing=smoothing).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            steps += 1
    net.eval()
    edge, right = (32 - crop) // 2, 0
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        for views, truth in zip(torch.split(test_images, 500), torch.split(test_labels, 500), strict=True):
            centre = views[:, edge : edge + crop, edge : edge + crop].permute(0, 3, 1, 2)
            probabilities = net(centre).float().softmax(1) + net(centre.flip(3)).float().softmax(1)
            right += int((probabilities.argmax(1) == truth).sum())
    return {"error": 100 - 100 * right / len(test_labels), "epochs": steps * batch / len(images)}


def alexprep(data: Path, runs: Path, seed: int, precision: str) -> dict[str, Any]:
    """The two commands."""
    command = [sys.executable, "-m", "alexprep.cli"]
    given = ["--data", str(data), "--runs", str(runs), "--precision", precision, "--device", "cpu"]
    name = f"seed{seed}"
    options = ["--recipe", "cifar10-fast", "--seed", str(seed), "--name", name, "--evaluate-every", "100"]
    trained = said([*command, "train", *options, *given, "--json"])
    found = said([*command, "eval", name, "--views", "two", *given, "--json"])
    return {"error": found["top1_error"], "epochs": trained["epochs"], "one view": trained["val_top1_error"]}


def said(command: list[str]) -> dict[str, Any]:
    """The JSON line with which a command ends."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    document: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return document


def cpu(who: int = resource.RUSAGE_SELF) -> float:
    """CPU seconds so far, of this process or of those that it started and that have ended."""
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def compared(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both, a turn each for every seed."""
    figures: dict[str, Any] = {
        "seeds": len(arguments.seeds),
        "threads": arguments.threads,
        "precision": arguments.precision,
    }
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="cifar-fast-") as folder:
        for seed in arguments.seeds:
            before = cpu(resource.RUSAGE_CHILDREN)
            ours = alexprep(arguments.data, Path(folder), seed, arguments.precision)
            between = cpu(resource.RUSAGE_CHILDREN)
            script = [sys.executable, str(ME), str(arguments.data), "--plain", str(between - before)]
            theirs = said([*script, "--seeds", str(seed), "--precision", arguments.precision])
            after = cpu(resource.RUSAGE_CHILDREN)
            turns = (("alexprep", ours, between - before), ("plain script", theirs, after - between))
            for name, each, seconds in turns:
                for key, value in {**each, "CPU seconds": seconds}.items():
                    found.setdefault(f"{name}: {key}", []).append(value)
                print(f"seed {seed}, {name}: {each['error']:.2f} % in {seconds:.0f} CPU seconds", file=sys.stderr)
    for key, values in found.items():
        figures[key] = statistics.mean(values)
        if key.endswith("error") and len(values) > 1:
            figures[f"{key}, each seed"] = values
    figures["alexprep's error less the script's, points"] = figures["alexprep: error"] - figures["plain script: error"]
    return figures


def main() -> None:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--plain", type=float, metavar="SECONDS", help="the script alone, with so much CPU time")
    arguments = parser.parse_args()
    if arguments.plain is not None:
        half = arguments.precision == "bf16"
        print(json.dumps(plain(arguments.data, arguments.plain, arguments.seeds[0], half)))
        return
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the processes that it starts
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    report("cifar-fast", compared(arguments), arguments.save)


if __name__ == "__main__":
    main()
