"""Where images come from, one layout a module. A source lists its inputs in a fixed order and reads one by its location."""

# Layout → module and class. In the order of looking: the more particular first. Each is imported only when it is its turn.
LAYOUTS = {
    "ilsvrc": "ilsvrc.IlsvrcArchives",
    "kaggle": "folders.Kaggle",
    "cifar": "cifar.Cifar",
    "mnist": "binary.Mnist",
    "norb": "binary.SmallNorb",
    "table": "table.Table",
    "webdataset": "wds.Webdataset",
    "tar": "tars.TarOfClassFolders",
    "folders": "folders.ClassFolders",
}
