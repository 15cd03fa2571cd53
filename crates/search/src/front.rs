//! What no other outcome beats, and how much of the plane it beats.

/// Share of an outcome's range by which the reference is worse than the worst.
const BEYOND: f64 = 0.1;

/// Whether `a` is at least as small as `b` in both, and smaller in one.
#[cfg(test)]
pub(crate) fn beats(a: [f64; 2], b: [f64; 2]) -> bool {
    a[0] <= b[0] && a[1] <= b[1] && a != b
}

/// The indices of outcomes that no other one beats, by the first outcome; of equal ones the first.
pub fn front(of: &[[f64; 2]]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..of.len()).filter(|&index| of[index].iter().all(|x| x.is_finite())).collect();
    order.sort_by(|&a, &b| of[a][0].total_cmp(&of[b][0]).then(of[a][1].total_cmp(&of[b][1])).then(a.cmp(&b)));
    let mut least = f64::INFINITY;
    order.retain(|&index| {
        let is_first = of[index][1] < least;
        least = least.min(of[index][1]);
        is_first
    });
    order
}

/// The area that outcomes beat of what is below `reference` in both.
pub fn hypervolume(of: &[[f64; 2]], reference: [f64; 2]) -> f64 {
    let inside: Vec<[f64; 2]> = of.iter().copied().filter(|[a, b]| *a < reference[0] && *b < reference[1]).collect();
    let mut area = 0.0;
    let mut above = reference[1];
    for index in front(&inside) {
        let [a, b] = inside[index];
        area += (reference[0] - a) * (above - b);
        above = b;
    }
    area
}

/// A reference for areas: of each outcome the worst that was seen, and a tenth of its range more, so that the ends of a front count.
pub fn reference(of: &[[f64; 2]]) -> [f64; 2] {
    [0, 1].map(|m| {
        let (least, most) =
            of.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(least, most), of| (least.min(of[m]), most.max(of[m])));
        most + BEYOND * (most - least)
    })
}

/// By how much the area grows with one more outcome; `front` are outcomes that do not beat each other, by the first.
pub(crate) fn gain(front: &[[f64; 2]], one: [f64; 2], reference: [f64; 2]) -> f64 {
    let [a, b] = one;
    if a >= reference[0] || b >= reference[1] {
        return 0.0;
    }
    let (mut area, mut from, mut above) = (0.0, a, reference[1]);
    for &[x, y] in front {
        if x <= a {
            // What is left of it bounds it from above.
            above = above.min(y);
        } else {
            let to = x.min(reference[0]);
            area += (to - from) * (above - b).max(0.0);
            (from, above) = (to, above.min(y));
        }
        if above <= b {
            return area;
        }
    }
    area + (reference[0] - from) * (above - b).max(0.0)
}

#[cfg(test)]
mod tests {
    use attune_tensor::Rng;

    use super::*;

    fn random(count: usize, seed: u64) -> Vec<[f64; 2]> {
        let mut rng = Rng::new(seed, "outcomes");
        (0..count).map(|_| [rng.uniform(), rng.uniform()]).collect()
    }

    #[test]
    fn the_front_is_what_comparing_all_with_all_leaves() {
        for seed in 0..20 {
            let of = random(60, seed);
            let mut found = front(&of);
            found.sort_unstable();
            let slow: Vec<usize> = (0..of.len()).filter(|&a| !of.iter().any(|b| beats(*b, of[a]))).collect();
            assert_eq!(found, slow);
        }
        assert_eq!(front(&[[1.0, 1.0], [1.0, 1.0], [f64::NAN, 0.0]]), [0]);
    }

    #[test]
    fn areas_agree_with_a_fine_raster_and_a_gain_is_what_the_area_grows_by() {
        assert!((hypervolume(&[[0.0, 1.0], [1.0, 0.0]], [2.0, 2.0]) - 3.0).abs() < 1e-12);
        for seed in 0..10 {
            let of = random(12, seed);
            let reference = [0.9, 0.8];
            let area = hypervolume(&of, reference);
            let cells = 400;
            let at = |index: usize, side: f64| (index as f64 + 0.5) / f64::from(cells) * side;
            let beaten = (0..cells as usize * cells as usize)
                .filter(|cell| {
                    let point = [at(cell % cells as usize, reference[0]), at(cell / cells as usize, reference[1])];
                    of.iter().any(|one| one[0] <= point[0] && one[1] <= point[1])
                })
                .count();
            let raster = beaten as f64 / f64::from(cells * cells) * reference[0] * reference[1];
            assert!((area - raster).abs() < 5e-3, "{area} {raster}");
            let kept: Vec<[f64; 2]> = front(&of).into_iter().map(|index| of[index]).collect();
            for one in random(40, seed + 100) {
                let with: Vec<[f64; 2]> = of.iter().copied().chain([one]).collect();
                let grown = hypervolume(&with, reference) - area;
                assert!((gain(&kept, one, reference) - grown).abs() < 1e-12, "{one:?}");
            }
        }
    }
}
