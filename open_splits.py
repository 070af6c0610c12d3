import torch.distributed as dist

import data

# Options of a command line that shape a dataset, where it takes them.
GIVEN = ("views", "split_by", "labels", "single_label", "cache_dir", "download")


def refuse_options(names, args):
    """Raises ValueError for an option that none of these datasets takes."""
    takes = {option for name in names for option in data.dataset_options(name)}
    for option in ("views", "split_by", "labels"):
        if getattr(args, option) is not None and option not in takes:
            raise ValueError(
                f"--{option.replace('_', '-')} means nothing for {', '.join(names)}; leave it out"
            )


def open_splits(name, args, env, **options):
    """(training set, test set) of a dataset, with those options of the command line that it takes;
    the main rank alone downloads, before the others. options: more of load_dataset.
    """
    for option in set(GIVEN) & set(data.dataset_options(name)):
        if getattr(args, option):
            options[option] = getattr(args, option)
    if options.get("download") and env.ranks > 1:
        if env.main:
            data.load_splits(name, args.data_dir, **options)
        dist.barrier()
    return data.load_splits(name, args.data_dir, **options)
