"""Pack a data set into tar shards, with its annotations beside the images.

  python jobs/make_shards.py --format coco --images val2017 --annotations instances_val2017.json --output val
  python jobs/make_shards.py --format voc --images VOCdevkit/VOC2007 --split trainval --output s3://bucket/voc
  python jobs/make_shards.py --format folder --images photographs --output s3://bucket/photographs

Images are copied byte for byte; the same input gives the same shards. Boxes without area, outside their image
or of an unknown class are refused by file and object, or left out with --skip-bad-boxes.
Exit codes: 0 done; 1 crash; 2 refused or broken off, and one line says why.
"""

import sys

from pipeline.config import MakeShardsConfig, run_job


def main(config: MakeShardsConfig) -> int:
    """Run the job; returns the exit code."""
    from pipeline.data.coco import read_coco
    from pipeline.data.sources import read_folder
    from pipeline.data.voc import read_voc
    from pipeline.data.write import summary_text, write_shards

    if config.format == "coco":
        source = read_coco(config.images, config.annotations)
    elif config.format == "voc":
        source = read_voc(config.images, config.annotations, split=config.split, class_names=config.classes)
    else:
        source = read_folder(config.images)
    made = write_shards(
        source,
        config.output,
        images_per_shard=config.images_per_shard,
        skip_bad_boxes=config.skip_bad_boxes,
        overwrite=config.overwrite,
    )
    print(summary_text(source, made, config.output))
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main, MakeShardsConfig, __doc__))
