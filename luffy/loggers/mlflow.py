"""MLflow: a SQLite store in the run folder, or the server that MLFLOW_TRACKING_URI names."""

import os
from typing import Any

from luffy.loggers.sink import Opening

ID = "luffy.id"


class Mlflow:
    appends = True

    def __init__(self, opening: Opening) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when the package is imported
        from mlflow import MlflowClient
        from mlflow.entities import RunStatus

        where = None
        if opening.online:
            self._client = MlflowClient()
        else:
            opening.folder.mkdir(exist_ok=True)
            where = (opening.folder / "artifacts").absolute().as_uri()
            self._client = MlflowClient(f"sqlite:///{(opening.folder / 'mlflow.db').absolute()}")
        experiment = self._client.get_experiment_by_name(opening.project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(opening.project, where)
        found = self._client.search_runs([number], f"tags.`{ID}` = '{opening.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, RunStatus.to_string(RunStatus.RUNNING))
        else:
            self._id = self._client.create_run(number, run_name=opening.name, tags={ID: opening.id}).info.run_id
            self._describe(opening.config)
        self.last = self._newest(found[0].data.metrics) if found and opening.online else -1

    def _describe(self, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:6000]) for key, value in flat(config).items()]
        for at in range(0, len(params), 100):  # the most of a request, as 6000 is of a value
            self._client.log_batch(self._id, params=params[at : at + 100])

    def _newest(self, metrics: dict[str, float]) -> int:
        steps = (point.step for key in metrics for point in self._client.get_metric_history(self._id, key)[-1:])
        return max(steps, default=-1)

    def write(self, step: int, numbers: dict[str, float], at: float) -> None:
        from mlflow.entities import Metric

        points = [Metric(key, value, round(1000 * at), step) for key, value in numbers.items()]
        for begin in range(0, len(points), 1000):
            self._client.log_batch(self._id, metrics=points[begin : begin + 1000])

    def close(self) -> None:
        self._client.set_terminated(self._id)


def flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """section.key -> value; a table without entries is one."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found
