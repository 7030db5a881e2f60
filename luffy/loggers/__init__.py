"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases, MLflow, trackio.

Each logger is a process of its own (`python -m luffy.loggers`), which reads metrics.jsonl and evals.jsonl as they grow
and hands them on. So training waits for none of them and survives whatever they do, and each can be built anew from the
files, which are the truth.

    started.py     the trainer's side: starts the processes and counts what they did not take
    follow.py      the process: from the files into a sink, and how far it came
    sink.py        what a sink is
    tensorboard.py, wandb.py, mlflow.py, trackio.py
"""
