"""cuda-convnet's nets as layer files, written out from what is known of the originals: a definition and its parameters each."""

from __future__ import annotations

DATA = "[data]\ntype=data\ndataIdx=0\n\n[labels]\ntype=data\ndataIdx=1\n"
COST = "\n[probs]\ntype=softmax\ninputs={last}\n\n[logprob]\ntype=cost.logreg\ninputs=labels,probs\n"


def layer(name: str, kind: str, inputs: str, **values: object) -> str:
    """A section."""
    lines = [f"\n[{name}]", f"type={kind}", f"inputs={inputs}", *(f"{key}={value}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


def conv(name: str, inputs: str, channels: str, filters: int, size: int, init: float, **more: object) -> str:
    values = {"channels": channels, "filters": filters, "filterSize": size, "initW": init, "sharedBiases": 1}
    return layer(name, "conv", inputs, **values, partialSum=4, **more)


def pool(name: str, inputs: str, kind: str = "max", **more: object) -> str:
    return layer(name, "pool", inputs, pool=kind, start=0, sizeX=3, stride=2, outputsX=0, **more)


def rates(**decays: float) -> str:
    """Of the layers with weights: 0.001, biases 0.002, momentum 0.9."""
    same = "epsW=0.001\nepsB=0.002\nmomW=0.9\nmomB=0.9\n"
    return "".join(f"[{name}]\n{same}wc={decay}\n\n" for name, decay in decays.items()) + "[logprob]\ncoeff=1\n"


def quick() -> tuple[str, str]:
    """layers-80sec.cfg."""
    text = DATA + conv("conv1", "data", "3", 32, 5, 0.0001, padding=2, stride=1) + pool("pool1", "conv1", neuron="relu")
    text += conv("conv2", "pool1", "32", 32, 5, 0.01, padding=2, stride=1, neuron="relu")
    text += pool("pool2", "conv2", "avg", channels=32)
    text += conv("conv3", "pool2", "32", 64, 5, 0.01, padding=2, stride=1, neuron="relu")
    text += pool("pool3", "conv3", "avg", channels=64)
    text += layer("fc64", "fc", "pool3", outputs=64, initW=0.1, neuron="relu")
    text += layer("fc10", "fc", "fc64", outputs=10, initW=0.1)
    return text + COST.format(last="fc10"), rates(conv1=0.004, conv2=0.004, conv3=0.004, fc64=0.03, fc10=0.03)


def conv_local(norm: bool) -> tuple[str, str]:
    """layers-conv-local-13pct.cfg, or with norms and a wider third layer -11pct.cfg."""
    text = DATA + conv("conv1", "data", "3", 64, 5, 0.0001, padding=2) + pool("pool1", "conv1", neuron="relu")
    before, more = "pool1", ""
    if norm:
        text += layer("rnorm1", "cmrnorm", "pool1", channels=64, size=9)
        before, more = "rnorm1", "\n[rnorm1]\nscale=0.001\npow=0.75\n\n[rnorm2]\nscale=0.001\npow=0.75\n"
    text += conv("conv2", before, "64", 64, 5, 0.01, padding=2, neuron="relu")
    text += layer("rnorm2", "cmrnorm", "conv2", channels=64, size=9) if norm else ""
    text += pool("pool2", "rnorm2" if norm else "conv2")
    unshared = {"padding": 1, "stride": 1, "filterSize": 3, "neuron": "relu", "initW": 0.04}
    text += layer("local3", "local", "pool2", channels=64, filters=64 if norm else 32, **unshared)
    text += layer("local4", "local", "local3", channels=64 if norm else 32, filters=32, **unshared)
    text += layer("fc10", "fc", "local4", outputs=10, initW=0.01)
    decays = {"conv1": 0.0, "conv2": 0.0, "local3": 0.004, "local4": 0.004, "fc10": 0.01 if norm else 0.004}
    return text + COST.format(last="fc10"), rates(**decays) + more


def net_145(divisor: int, classes: int) -> tuple[str, str]:
    """layers-145.cfg: a tower on each of two GPUs, the second of which has names in b; every width over a divisor."""
    c1, c2, c3, c5, f = (width // divisor for width in (48, 128, 192, 128, 2048))
    text, more = DATA, ""

    def both(make: str, **values: str) -> str:
        return "".join(make.replace("@", tower) for tower in "ab")

    text += both(conv("conv1@", "data", "3", c1, 11, 0.01, stride=4, gpu=0))
    text += both(layer("rnorm1@", "cmrnorm", "conv1@", channels=c1, size=5))
    text += both(pool("pool1@", "rnorm1@", channels=c1, neuron="relu"))
    text += both(conv("conv2@", "pool1@", f"{c1}", c2, 5, 0.01, padding=2, initB=1, neuron="relu"))
    text += both(layer("rnorm2@", "cmrnorm", "conv2@", channels=c2, size=5))
    text += both(layer("cnorm2@", "rnorm", "rnorm2@", channels=c2, size=5))
    text += both(pool("pool2@", "cnorm2@", channels=c2))
    text += both(conv("conv3@", "pool2a,pool2b", f"{c2},{c2}", c3, 3, 0.03, padding="1,1", neuron="relu"))
    text += both(conv("conv4@", "conv3@", f"{c3}", c3, 3, 0.03, padding=1, initB=1, neuron="relu"))
    text += both(conv("conv5@", "conv4@", f"{c3}", c5, 3, 0.03, padding=1, initB=1))
    text += both(pool("pool3@", "conv5@", channels=c5, neuron="relu"))
    for name, inputs in (("fc6", "pool3a,pool3b"), ("fc7", "drop6a,drop6b")):
        text += both(layer(f"{name}@", "fc", inputs, outputs=f, initW="0.01,0.01", initB=1, neuron="relu"))
        text += both(layer(f"drop{name[2]}@", "hs", f"{name}@", keep=0.5))
    text += layer("fc8", "fc", "drop7a,drop7b", outputs=classes, initW="0.01,0.01")
    norms = {"rnorm1@": "0.0001", "rnorm2@": "0.0001", "cnorm2@": "0.001"}
    for name, scale in norms.items():
        least = "" if name == "cnorm2@" else "minDiv=2\n"
        more += both(f"[{name}]\nscale={scale}\npow=0.75\n{least}")
    return text + COST.format(last="fc8"), more
