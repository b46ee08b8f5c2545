"""OpenVINO on CPUs. Nothing is imported here: the process that converts loads this folder without the rest of optkit."""
