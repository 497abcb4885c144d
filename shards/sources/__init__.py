"""Where images come from: one source a file.

To add one, write a module with a subclass of `base.Source`, whose docstring says what it needs, and add a line to `LAYOUTS`.
"""

# Layout → module and class. In the order of looking: the more particular first. Each is imported only when it is its turn.
LAYOUTS = {
    "ilsvrc": "ilsvrc.IlsvrcArchives",
    "kaggle": "folders.Kaggle",
    "cifar": "binary_records.Cifar",
    "mnist": "binary_records.Mnist",
    "norb": "binary_records.SmallNorb",
    "norb-stereo": "binary_records.StereoNorb",  # the same files: only where it is named
    "synset-tars": "ilsvrc.SynsetTars",
    "tiny-imagenet": "published.TinyImageNet",
    "places365": "published.Places365",
    "sun397": "published.Sun397",
    "food-101": "published.Food101",
    "cub-200-2011": "published.Cub200",
    "oxford-pets": "published.OxfordPets",
    "flowers-102": "published.Flowers102",
    "dtd": "published.DescribableTextures",
    "fgvc-aircraft": "published.FgvcAircraft",
    "stanford-dogs": "published.StanfordDogs",
    "gtsrb": "published.Gtsrb",
    "hub-imagenet": "hub_archives.HubArchives",
    "arrow": "arrow_images.ArrowImages",
    "tfrecord": "tfrecords.TFRecords",
    "recordio": "recordio.RecordIO",
    "lmdb": "lmdb_databases.LmdbDatabases",
    "parquet": "parquet_images.ParquetImages",
    "table": "table.Table",
    "imagefolder": "image_folders.ImageFolder",
    "webdataset": "wds.Webdataset",
    "tar": "tars.TarOfClassFolders",
    "zip": "zips.ZipOfClassFolders",
    "folders": "folders.ClassFolders",
}
BY_FOLDERS = ("tar", "zip", "folders")  # those that read folders, where the user may have to say what they mean
BY_COLUMNS = ("arrow", "tfrecord", "parquet", "table", "imagefolder")  # those that read columns, likewise
# Those that also read pictures without labels.
WITHOUT_LABELS = ("arrow", "tfrecord", "recordio", "lmdb", "parquet", "webdataset", "tar", "zip", "folders")
