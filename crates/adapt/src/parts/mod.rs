//! What methods share.

pub(crate) mod anew;
pub(crate) mod blocks;
pub(crate) mod budget;
pub(crate) mod calibration;
pub(crate) mod choice;
pub(crate) mod clusters;
pub(crate) mod dropout;
pub(crate) mod elastic;
pub(crate) mod factors;
pub(crate) mod foreign;
pub(crate) mod gamma;
pub(crate) mod gates;
pub(crate) mod hadamard;
pub(crate) mod keys;
pub(crate) mod linears;
pub(crate) mod masks;
pub(crate) mod mixing;
pub(crate) mod orthogonal;
pub(crate) mod own;
pub(crate) mod preconditioned;
pub(crate) mod prompt;
pub(crate) mod scaling;
pub(crate) mod search;
pub(crate) mod shares;
pub(crate) mod sparse;
pub(crate) mod spectral;
pub(crate) mod spectrum;
pub(crate) mod spread;
pub(crate) mod starts;
pub(crate) mod subspaces;
pub(crate) mod tiles;
pub(crate) mod torch;
#[cfg(test)]
pub(crate) mod toy;
pub(crate) mod weights;
