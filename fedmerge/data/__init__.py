"""Data sets, their splits between server and clients, and augmentation."""

from fedmerge.data._augment import augment
from fedmerge.data._cache import cache_folder
from fedmerge.data._catalogue import DATASETS, DataSet, load, names, summaries
from fedmerge.data._decode import parquet_source
from fedmerge.data._images import Dataset, Images
from fedmerge.data._partition import PARTITIONS, Partition, partition, partition_summaries, partitions
from fedmerge.data._split import Split, label_counts, split
from fedmerge.data._tensors import as_data, labelled

__all__ = [
    "DATASETS",
    "PARTITIONS",
    "DataSet",
    "Dataset",
    "Images",
    "Partition",
    "Split",
    "as_data",
    "augment",
    "cache_folder",
    "label_counts",
    "labelled",
    "load",
    "names",
    "parquet_source",
    "partition",
    "partition_summaries",
    "partitions",
    "split",
    "summaries",
]
