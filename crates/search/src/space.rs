//! The places where a job can be: one value of each axis.

use attune_tensor::Rng;

/// An axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Axis {
    /// How many values it has.
    pub values: usize,
    /// Whether neighbours in its list are alike, as sizes are and names are not.
    pub ordered: bool,
}

/// A value of each axis, by its index.
pub type Place = Vec<usize>;

/// What came of a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Tried {
    /// Where it was.
    pub place: Place,
    /// Its two outcomes, both to be made small; none if it failed.
    pub outcome: Option<[f64; 2]>,
}

/// All places.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Space {
    axes: Vec<Axis>,
}

impl Space {
    /// The space of these axes.
    pub fn new(axes: Vec<Axis>) -> Self {
        Self { axes }
    }

    /// Its axes.
    pub fn axes(&self) -> &[Axis] {
        &self.axes
    }

    /// How many places it has, as far as that can be counted.
    pub fn places(&self) -> u128 {
        self.axes.iter().fold(1, |places, axis| places.saturating_mul(axis.values as u128))
    }

    /// A place as numbers from 0 to 1: one for an ordered axis or one of two values, else one for each value, which is 1 for its own.
    pub fn features(&self, place: &[usize]) -> Vec<f64> {
        let mut features = Vec::with_capacity(self.axes.len());
        for (axis, &value) in self.axes.iter().zip(place) {
            if axis.ordered || axis.values <= 2 {
                features.push(value as f64 / (axis.values.max(2) - 1) as f64);
            } else {
                features.extend((0..axis.values).map(|other| if other == value { 1.0 } else { 0.0 }));
            }
        }
        features
    }

    /// The places that differ in one axis.
    pub fn neighbours<'s>(&'s self, place: &'s [usize]) -> impl Iterator<Item = Place> + 's {
        self.axes.iter().enumerate().flat_map(move |(at, axis)| {
            (0..axis.values).filter(move |value| *value != place[at]).map(move |value| {
                let mut other = place.to_vec();
                other[at] = value;
                other
            })
        })
    }

    /// A place at random.
    pub(crate) fn any(&self, rng: &mut Rng) -> Place {
        self.axes.iter().map(|axis| rng.below(axis.values as u64) as usize).collect()
    }

    /// So many places that have each value of an axis about equally often: a Latin hypercube.
    pub(crate) fn spread(&self, places: usize, rng: &mut Rng) -> Vec<Place> {
        let columns: Vec<Vec<usize>> = self
            .axes
            .iter()
            .map(|axis| {
                // Where fewer places than values are asked for, each stratum gives one of its values.
                let at = |stratum: usize, rng: &mut Rng| {
                    let (from, to) = (stratum * axis.values / places, (stratum + 1) * axis.values / places);
                    from + rng.below((to.saturating_sub(from)).max(1) as u64) as usize
                };
                let order = rng.permutation(places);
                order.into_iter().map(|stratum| at(stratum, rng).min(axis.values - 1)).collect()
            })
            .collect();
        (0..places).map(|index| columns.iter().map(|column| column[index]).collect()).collect()
    }

    /// Every place, the last axis fastest.
    pub fn all(&self) -> impl Iterator<Item = Place> + '_ {
        (0..self.places()).map(|index| self.at(index))
    }

    fn at(&self, mut index: u128) -> Place {
        let mut place = vec![0; self.axes.len()];
        for (value, axis) in place.iter_mut().zip(&self.axes).rev() {
            *value = (index % axis.values as u128) as usize;
            index /= axis.values as u128;
        }
        place
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn space() -> Space {
        let axis = |values, ordered| Axis { values, ordered };
        Space::new(vec![axis(5, true), axis(2, false), axis(3, false)])
    }

    #[test]
    fn features_keep_what_is_alike_together() {
        let space = space();
        assert_eq!(space.places(), 30);
        assert_eq!(space.features(&[1, 1, 2]), [0.25, 1.0, 0.0, 0.0, 1.0]);
        let all: BTreeSet<Place> = space.all().collect();
        assert_eq!((all.len(), all.first().unwrap(), all.last().unwrap()), (30, &vec![0, 0, 0], &vec![4, 1, 2]));
    }

    #[test]
    fn neighbours_differ_in_one_axis() {
        let place = vec![4, 0, 1];
        let space = space();
        let found: Vec<Place> = space.neighbours(&place).collect();
        assert_eq!(found.len(), 4 + 1 + 2);
        assert!(found.iter().all(|other| other.iter().zip(&place).filter(|(a, b)| a != b).count() == 1));
    }

    #[test]
    fn a_spread_has_each_value_equally_often() {
        let space = space();
        let places = space.spread(30, &mut Rng::new(7, "spread"));
        for (at, axis) in space.axes().iter().enumerate() {
            let count = |value| places.iter().filter(|place| place[at] == value).count();
            assert!((0..axis.values).all(|value| count(value) == 30 / axis.values), "axis {at}");
        }
        let few = space.spread(3, &mut Rng::new(7, "spread"));
        let values: BTreeSet<usize> = few.iter().map(|place| place[0]).collect();
        assert_eq!((few.len(), values.len()), (3, 3));
    }
}
