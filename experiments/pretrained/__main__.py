"""The command `python -m experiments.pretrained`: see `calibrate_command`."""

from experiments.pretrained.calibrate_command import Config as Config
from experiments.pretrained.calibrate_command import main

if __name__ == "__main__":
    main()
