"""One stand-alone evaluator a model, for ``--eval FILE`` and ``--calib FILE:calibration``."""
