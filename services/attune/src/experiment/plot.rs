//! The picture of a grid: loss against what a job cost, a panel for each column of its table and each kind of cost.

use std::fmt::Write as _;

/// Size of a panel, and the room around its axes.
const PANEL: (f64, f64) = (760.0, 460.0);
const LEFT: f64 = 64.0;
const RIGHT: f64 = 120.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 52.0;
/// Size of a label's letters, and what one of them is wide on average.
const LETTER: (f64, f64) = (6.0, 11.0);
/// How many marks an axis has about.
const MARKS: f64 = 6.0;

/// A box of a label.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Label {
    x: f64,
    y: f64,
    width: f64,
}

impl Label {
    fn meets(&self, other: &Self) -> bool {
        let apart = (self.x - other.x).abs() * 2.0 >= self.width + other.width || (self.y - other.y).abs() >= LETTER.1;
        !apart
    }
}

/// What a job cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cost {
    /// Parameters that train.
    Parameters,
    /// Seconds of training.
    Seconds,
    /// The most memory of its process, in MiB.
    Mebibytes,
}

impl Cost {
    /// Every kind, in the order of the panels.
    pub(crate) const ALL: [Self; 3] = [Self::Parameters, Self::Seconds, Self::Mebibytes];

    const fn title(self) -> &'static str {
        match self {
            Self::Parameters => "parameters that train",
            Self::Seconds => "seconds of training",
            Self::Mebibytes => "MiB of memory at most",
        }
    }
}

/// Points and what they are of.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Panel {
    /// What the losses are of.
    pub(crate) title: String,
    /// What they are drawn against, on an axis of powers.
    pub(crate) cost: Cost,
    /// Cost, above 0, loss and name of each point; one without a name is small.
    pub(crate) points: Vec<(f64, f64, String)>,
}

/// An SVG of all panels, one below the other.
pub(crate) fn svg(title: &str, panels: &[Panel]) -> String {
    let (width, height) = (PANEL.0, PANEL.1 * panels.len().max(1) as f64);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<title>{}</title>\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n",
        escaped(title)
    );
    for (index, Panel { title, cost, points }) in panels.iter().enumerate() {
        let points: Vec<(f64, f64, &str)> = points.iter().map(|(x, y, name)| (*x, *y, name.as_str())).collect();
        let _ = writeln!(svg, "<g transform=\"translate(0 {})\">", PANEL.1 * index as f64);
        panel(&mut svg, title, *cost, &points);
        svg.push_str("</g>\n");
    }
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, column: &str, cost: Cost, points: &[(f64, f64, &str)]) {
    let title = format!("{column}: loss by {}", cost.title());
    let _ = writeln!(svg, "<text x=\"{LEFT}\" y=\"20\" font-size=\"14\">{}</text>", escaped(&title));
    if points.is_empty() {
        return;
    }
    let logs: Vec<f64> = points.iter().map(|(x, _, _)| x.log10()).collect();
    let losses: Vec<f64> = points.iter().map(|(_, y, _)| *y).collect();
    let ((x0, x1), (y0, y1)) = (span(&logs), span(&losses));
    let at_x = |log: f64| LEFT + (log - x0) / (x1 - x0) * (PANEL.0 - LEFT - RIGHT);
    let at_y = |loss: f64| PANEL.1 - BOTTOM - (loss - y0) / (y1 - y0) * (PANEL.1 - TOP - BOTTOM);
    let (bottom, right) = (PANEL.1 - BOTTOM, PANEL.0 - RIGHT);
    let _ = writeln!(svg, "<path d=\"M{LEFT} {TOP}V{bottom}H{right}\" fill=\"none\" stroke=\"#444\"/>");
    for mark in powers(x0, x1) {
        let x = at_x(mark.log10());
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {TOP}V{bottom}\" stroke=\"#ddd\"/><text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            bottom + 16.0,
            thousands(mark)
        );
    }
    let step = nice((y1 - y0) / MARKS);
    let digits = (-step.log10().floor()).max(0.0) as usize;
    let mut mark = (y0 / step).ceil();
    while mark * step <= y1 {
        let y = at_y(mark * step);
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {y:.1}H{right}\" stroke=\"#ddd\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{:.digits$}</text>",
            LEFT - 6.0,
            y + 4.0,
            mark * step
        );
        mark += 1.0;
    }
    let _ = writeln!(
        svg,
        "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>\
         <text transform=\"translate(14 {:.1}) rotate(-90)\" text-anchor=\"middle\">validation loss</text>",
        f64::midpoint(LEFT, right),
        PANEL.1 - 12.0,
        cost.title(),
        f64::midpoint(TOP, bottom)
    );
    let places = points.iter().zip(&logs).map(|((_, loss, name), log)| (at_x(*log), at_y(*loss), *name));
    let (named, plain): (Vec<_>, Vec<_>) = places.partition(|(_, _, name)| !name.is_empty());
    for (x, y, _) in &plain {
        let _ = writeln!(svg, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" fill=\"#9aa\"/>");
    }
    for ((x, y, name), label) in named.iter().zip(labels(&named, &plain)) {
        let _ = writeln!(
            svg,
            "<path d=\"M{x:.1} {y:.1}L{:.1} {:.1}\" stroke=\"#bbb\"/><circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3.5\" \
             fill=\"#1f6fb4\"/><text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            label.x,
            label.y,
            label.x,
            label.y + 4.0,
            escaped(name)
        );
    }
}

/// Where the names of points stand: as near as they can without lying on one another, on a point or on one of the `plain` ones.
fn labels(places: &[(f64, f64, &str)], plain: &[(f64, f64, &str)]) -> Vec<Label> {
    let dots: Vec<Label> = places.iter().chain(plain).map(|(x, y, _)| Label { x: *x, y: *y, width: 8.0 }).collect();
    let mut taken: Vec<Label> = Vec::new();
    for (x, y, name) in places {
        let width = LETTER.0 * name.chars().count() as f64;
        let beside = width / 2.0 + 7.0;
        // Rings of places around the point, to the right first.
        let rings = (0..24).flat_map(|ring| {
            let far = f64::from(ring) * 7.0;
            [(beside, -far), (beside, far), (-beside, -far), (-beside, far), (0.0, -13.0 - far), (0.0, 13.0 + far)]
        });
        let candidates = rings.map(|(dx, dy)| Label { x: x + dx, y: y + dy, width });
        let inside = |label: &Label| {
            label.x - label.width / 2.0 > LEFT
                && label.y > TOP - 8.0
                && label.y < PANEL.1 - BOTTOM
                && label.x + label.width / 2.0 < PANEL.0
        };
        let free = |label: &Label| inside(label) && !taken.iter().chain(&dots).any(|other| label.meets(other));
        let own = Label { x: x + beside, y: *y, width };
        taken.push(candidates.into_iter().find(free).unwrap_or(own));
    }
    taken
}

/// The range of some values with a little room on either side.
fn span(values: &[f64]) -> (f64, f64) {
    let (min, max) = values.iter().fold((f64::MAX, f64::MIN), |(min, max), x| (min.min(*x), max.max(*x)));
    let room = (0.05 * (max - min)).max(1e-3);
    (min - room, max + room)
}

/// The nearest of 1, 2 and 5 times a power of ten that is no less.
fn nice(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    [1.0, 2.0, 5.0].into_iter().map(|digit| digit * power).find(|nice| *nice >= step).unwrap_or(10.0 * power)
}

/// Where an axis of powers has marks between two logarithms: at powers of ten, or of a short one at 1, 2 and 5 times these, or of a very
/// short one at even distances.
fn powers(from: f64, to: f64) -> Vec<f64> {
    if to - from < 0.8 {
        let (first, last) = (10f64.powf(from), 10f64.powf(to));
        let step = nice((last - first) / MARKS);
        let numbers = (first / step).ceil() as u64..=(last / step).floor() as u64;
        return numbers.map(|number| number as f64 * step).collect();
    }
    let digits: &[f64] = if to - from > 2.0 { &[1.0] } else { &[1.0, 2.0, 5.0] };
    let tens = from.floor() as i32..=to.ceil() as i32;
    let all = tens.flat_map(|power| digits.iter().map(move |digit| digit * 10f64.powi(power)));
    all.filter(|mark| (from..=to).contains(&mark.log10())).collect()
}

/// A number as people write it, with three digits that count at most.
fn thousands(number: f64) -> String {
    let group = ((number.max(1.0).log10() + 1e-9) as usize / 3).min(4);
    let scaled = number / 1000f64.powi(group as i32);
    let digits = (2.0 - scaled.log10().floor()).clamp(0.0, 6.0) as usize;
    let text = format!("{scaled:.digits$}");
    let text = if digits > 0 { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text}{}", ["", " k", " M", " G", " T"][group])
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_labels_lie_on_one_another() {
        // Forty points on a small spot, as methods of one size are.
        let names: Vec<String> = (0..40).map(|i| format!("method-{i}")).collect();
        let places: Vec<(f64, f64, &str)> = names
            .iter()
            .enumerate()
            .map(|(i, name)| (300.0 + (i % 7) as f64 * 9.0, 200.0 + (i / 7) as f64 * 6.0, name.as_str()))
            .collect();
        let found = labels(&places, &[]);
        for (at, label) in found.iter().enumerate() {
            assert!(found[..at].iter().all(|other| !label.meets(other)), "{}", names[at]);
        }
    }

    #[test]
    fn marks_are_round() {
        assert_eq!([0.013, 0.2, 0.7, 3.0].map(nice), [0.02, 0.2, 1.0, 5.0]);
        assert_eq!([0.05, 1.0, 200.0, 1e3, 5e5, 1e6].map(thousands), ["0.05", "1", "200", "1 k", "500 k", "1 M"]);
        assert_eq!(powers(2.0, 5.1), [1e2, 1e3, 1e4, 1e5]);
        assert_eq!(powers(1.4, 2.5), [50.0, 100.0, 200.0]);
        assert_eq!(powers(2.1, 2.5), [150.0, 200.0, 250.0, 300.0]);
        assert_eq!([150.0, 1500.0, 12.5, 999.0].map(thousands), ["150", "1.5 k", "12.5", "999"]);
    }
}
