"""Writes iris.csv from the copy of the data set that scikit-learn ships."""

import csv
import os

import sklearn.datasets

with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "iris.csv"), "w", newline="") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["sepal_length", "sepal_width", "petal_length", "petal_width"])
    writer.writerows(sklearn.datasets.load_iris().data.tolist())
