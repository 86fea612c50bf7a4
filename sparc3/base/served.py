"""The code of a registered model, which MLflow copies beside it and runs when it is loaded: a base
model from its folder, with a circuit's adapter on it. It needs transformers and peft, not sparc3.
"""

from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class Edited(PythonModel):
    """Completions of prompts by the edited model."""

    def load_context(self, context: PythonModelContext) -> None:
        """From `base` and `dtype` of model_config; load_model takes another base."""
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = context.model_config["base"]
        dtype = context.model_config["dtype"]
        self.tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
        self.model = PeftModel.from_pretrained(model, context.artifacts["adapter"]).eval()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]: MLflow's returns nothing
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> list[str]:
        """A completion of every prompt, one a row, the column `prompt`."""
        every: list[str] = []
        for prompt in model_input["prompt"]:
            inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            tokens = self.model.generate(**inputs, **(params or {}))[0]
            every.append(self.tokenizer.decode(tokens[inputs.input_ids.shape[1] :]))
        return every


set_model(Edited())
