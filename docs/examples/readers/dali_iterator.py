"""A DALI pipeline of one's own, for torch: `python docs/examples/readers/dali_iterator.py alexprep-data`."""

import sys

from nvidia.dali import fn, pipeline_def
from nvidia.dali.plugin.base_iterator import LastBatchPolicy
from nvidia.dali.plugin.pytorch import DALIGenericIterator

from alexprep.pipeline import decode_crop, label, reader, to_tensor


@pipeline_def(batch_size=16, num_threads=2, device_id=None)
def pictures(data: str):
    encoded, digits = reader(data, "train", random_shuffle=True, initial_fill=1000)
    return to_tensor(decode_crop(encoded), fn.random.coin_flip(), [-124.0, -117.0, -104.0]), label(digits)


names, policy = ["images", "labels"], LastBatchPolicy.PARTIAL
batches = DALIGenericIterator(pictures(sys.argv[1]), names, reader_name="shards", last_batch_policy=policy)
seen = [batch["labels"] for (batch,) in batches]  # int64 (N,), beside float32 (N, 3, H, W)
print(f"{sum(map(len, seen))} samples in {len(seen)} batches")
