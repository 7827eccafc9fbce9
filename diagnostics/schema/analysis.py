"""What are the metrics of a run? A dataset that any file format takes, whatever its attributes are."""

from __future__ import annotations

from typing import Any

import xarray as xr

from depthscope.diagnostics.schema.attributes import encode_dataset


class Analysis(xr.Dataset):
    """A Dataset of metrics, which writes attributes that netCDF has no type for, such as a dict, as JSON text."""

    __slots__ = ()

    @classmethod
    def of(cls, dataset: xr.Dataset) -> Analysis:
        """The same variables, coordinates and attributes."""
        return cls(dataset.data_vars, dataset.coords, dataset.attrs)

    def to_netcdf(self, *arguments: Any, **options: Any) -> Any:
        """As of Dataset."""
        return xr.Dataset.to_netcdf(encode_dataset(self), *arguments, **options)

    def to_zarr(self, *arguments: Any, **options: Any) -> Any:
        """As of Dataset."""
        return xr.Dataset.to_zarr(encode_dataset(self), *arguments, **options)


class AnalysisTree(xr.DataTree):
    """An `Analysis` of each of several chains."""

    __slots__ = ()

    def to_netcdf(self, *arguments: Any, **options: Any) -> Any:
        """As of DataTree."""
        return xr.DataTree.to_netcdf(self.map_over_datasets(encode_dataset), *arguments, **options)

    def to_zarr(self, *arguments: Any, **options: Any) -> Any:
        """As of DataTree."""
        return xr.DataTree.to_zarr(self.map_over_datasets(encode_dataset), *arguments, **options)
