"""Other libraries, each in a file of its own.

The files use the public names of minikeras and the wording of errors.py. The core imports none of
them.

sklearn.py        Classifier and Regressor: a model as a scikit-learn estimator;
                  named_callbacks.py gives their callbacks names that searches use
huggingface.py    HubModel: save_pretrained, from_pretrained, push_to_hub
tensorboard.py, mlflow.py, wandb.py
                  TensorBoard, MLflow, WandB: callbacks that log a fit to a run; tracking.py is
                  what they share
"""
