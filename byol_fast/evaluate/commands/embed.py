"""Features of a folder of images (or any data set) as one .npy, with an index of names."""

from __future__ import annotations

import argparse
from pathlib import Path

from byol_fast.evaluate.commands import common


def flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("data", metavar="DIR", help="images: a folder, .beton, tar shards, .npz")
    add("folder", metavar="OUT", type=Path, help="folder for features.npy, names.txt, about.json")
    add("--root", help="folder of the images that a list names; else the list's own")
    common.weights_flags(parser)
    add("--dtype", choices=["float32", "float16"], default="float32", help="of the file")
    add("--batch-size", type=int, default=256, help="images of one forward pass")


def run(args: argparse.Namespace) -> None:
    """Raises as `common.open_network`, `stores.open_store` and `embedding.embed`."""
    if args.batch_size < 1:
        raise ValueError("--batch-size must be at least 1")
    args.no_cache, args.cache = True, None
    from byol_fast.evaluate import embedding
    from pipelines.stores import open_store

    network = common.open_network(args)
    store = open_store(args.data, root=args.root, verify=False)
    cache = common.open_cache(args, network)
    done = embedding.embed(
        network.backbone,
        store,
        args.folder,
        key=cache.key(store, **network.deciding),
        dtype=args.dtype,
        batch_size=args.batch_size,
        label="features",
        **network.reading,
    )
    shape = f"{done.rows:,} × {done.width} {args.dtype}"
    if not done.computed:
        print(f"{done.file}: {shape}, all there already")
        return
    rate = done.computed / max(done.seconds, 1e-9)
    before = done.rows - done.computed
    went_on = f", {before:,} rows were there already" if before else ""
    print(f"{done.file}: {shape}, {rate:,.0f} images/s{went_on}")
    if done.bad:
        print(f"{len(done.bad)} images could not be decoded: NaN, and named in about.json")
