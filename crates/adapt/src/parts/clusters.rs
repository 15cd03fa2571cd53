//! Points in groups by nearness.

use attune_tensor::rng::Rng;

/// Which of `k` groups each point, a row of `points` of the same width each, is in: Lloyd's iteration from points that are drawn, at most `rounds`
/// times. No group is empty, and they are numbered by their first points; `k` is at most the number of points, and at least 1.
pub(crate) fn of(points: &[Vec<f64>], k: usize, rounds: usize, rng: &mut Rng) -> Vec<usize> {
    let k = k.clamp(1, points.len().max(1));
    let mut drawn = rng.permutation(points.len());
    drawn.truncate(k);
    let mut centres: Vec<Vec<f64>> = drawn.iter().map(|at| points[*at].clone()).collect();
    let mut groups: Vec<usize> = Vec::new();
    for _ in 0..rounds.max(1) {
        let nearest = assigned(points, &centres);
        if nearest == groups {
            break;
        }
        groups = nearest;
        centres = means(points, &groups, k);
    }
    numbered(&groups, k)
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

/// The nearest centre of each point, the first of several; one that is nobody's takes the point that is farthest from its own among those
/// that are not alone there.
fn assigned(points: &[Vec<f64>], centres: &[Vec<f64>]) -> Vec<usize> {
    let nearest = |point: &Vec<f64>| {
        let mut best = (0, f64::INFINITY);
        for (at, centre) in centres.iter().enumerate() {
            let far = distance(point, centre);
            if far < best.1 {
                best = (at, far);
            }
        }
        best
    };
    let found: Vec<(usize, f64)> = points.iter().map(nearest).collect();
    let mut groups: Vec<usize> = found.iter().map(|(group, _)| *group).collect();
    let mut sizes = vec![0usize; centres.len()];
    groups.iter().for_each(|group| sizes[*group] += 1);
    for empty in 0..centres.len() {
        if sizes[empty] > 0 {
            continue;
        }
        let mut far: Option<usize> = None;
        for at in (0..points.len()).filter(|at| sizes[groups[*at]] > 1) {
            if far.is_none_or(|far| found[at].1 > found[far].1) {
                far = Some(at);
            }
        }
        let Some(far) = far else { continue };
        sizes[groups[far]] -= 1;
        sizes[empty] += 1;
        groups[far] = empty;
    }
    groups
}

fn means(points: &[Vec<f64>], groups: &[usize], k: usize) -> Vec<Vec<f64>> {
    let width = points.first().map_or(0, Vec::len);
    let (mut sums, mut sizes) = (vec![vec![0.0; width]; k], vec![0usize; k]);
    for (point, group) in points.iter().zip(groups) {
        sums[*group].iter_mut().zip(point).for_each(|(sum, x)| *sum += x);
        sizes[*group] += 1;
    }
    for (sum, size) in sums.iter_mut().zip(sizes) {
        sum.iter_mut().for_each(|sum| *sum /= size.max(1) as f64);
    }
    sums
}

/// The same groups, numbered by their first points.
fn numbered(groups: &[usize], k: usize) -> Vec<usize> {
    let (mut numbers, mut next) = (vec![None; k], 0);
    let number = |group: &usize| {
        *numbers[*group].get_or_insert_with(|| {
            next += 1;
            next - 1
        })
    };
    groups.iter().map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(at: &[f64]) -> Vec<Vec<f64>> {
        at.iter().map(|x| vec![*x]).collect()
    }

    #[test]
    fn points_that_lie_together_are_together_whatever_the_draw() {
        for seed in 0..20 {
            let points = line(&[5.0, 0.1, 5.1, 0.0, 0.2, 4.9]);
            assert_eq!(of(&points, 2, 10, &mut Rng::new(seed, "draw")), [0, 1, 0, 1, 1, 0], "{seed}");
        }
    }

    #[test]
    fn no_group_is_empty_even_where_points_are_equal() {
        for seed in 0..20 {
            let groups = of(&line(&[1.0; 6]), 4, 10, &mut Rng::new(seed, "draw"));
            let mut all = groups.clone();
            all.sort_unstable();
            all.dedup();
            assert_eq!((groups.len(), all.len(), groups[0]), (6, 4, 0));
        }
        assert_eq!(of(&line(&[3.0, 1.0, 2.0]), 9, 10, &mut Rng::new(1, "draw")), [0, 1, 2]);
        assert!(of(&[], 2, 10, &mut Rng::new(1, "draw")).is_empty());
    }

    #[test]
    fn each_point_is_nearest_to_the_mean_of_its_group() {
        let mut rng = Rng::new(5, "points");
        let points: Vec<Vec<f64>> = (0..60).map(|_| vec![rng.normal(), rng.normal()]).collect();
        let groups = of(&points, 4, 100, &mut rng);
        let centres = means(&points, &groups, 4);
        for (point, group) in points.iter().zip(&groups) {
            assert!((0..4).all(|other| distance(point, &centres[*group]) <= distance(point, &centres[other]) + 1e-12));
        }
    }
}
