"""The ring example on Ray Train, with two workers on the CPU.

compile finds the process group that Ray has created; nothing else changes.
"""

import argparse
import os
from pathlib import Path

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ring_focal import main as ring


def train(config):  # runs in each worker
    return ring(**config)


def main(epochs, batch_size, folder="ray_results"):
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # what workers print stays in Ray's logs; on a cluster: ray.init()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    trainer = TorchTrainer(
        train,
        train_loop_config={"epochs": epochs, "batch_size": batch_size},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(Path(folder).resolve())),
    )
    dfhistory = trainer.fit().return_value  # of rank 0
    ray.shutdown()
    return dfhistory


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=100, help="of each worker")
    print(main(**vars(parser.parse_args())))
