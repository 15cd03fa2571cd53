//! Grids with faults.

use crate::support::Place;

#[test]
fn faults_of_a_grid_and_of_its_jobs_are_told_at_once() {
    let place = Place::with_demo();
    let grid = |vary: &str| {
        std::fs::write(
            place.path().join("grid.yaml"),
            format!("version: 1\nname: g\njob: ./text.yaml\nvary: {vary}\n"),
        )
        .unwrap();
        let ran = place.run(&["experiment", "run", "grid.yaml"]);
        assert_eq!((ran.status, ran.stdout.as_str()), (2, ""), "{}", ran.all());
        ran.stderr
    };
    let unreached = {
        let grid = "version: 1\nname: g\njob: ./text.yaml\nvary: [{name: s, field: tune.seed, values: [1]}]\n";
        std::fs::write(place.path().join("grid.yaml"), grid).unwrap();
        place.run(&["experiment", "run", "grid.yaml", "--server", "http://127.0.0.1:1"])
    };
    assert_eq!(unreached.status, 1);
    assert!(unreached.stderr.contains("no server answers at http://127.0.0.1:1"), "{}", unreached.all());
    let jobs = grid("[{name: rank, field: tune.steps, values: [1, 0, -1]}]");
    assert!(jobs.contains("`tune.steps` is 0; expected 1 or more (of rank=0)"), "{jobs}");
    assert!(jobs.contains("(of rank=-1)"), "{jobs}");
    let listed = grid("[{name: rank, values: [1]}]");
    assert!(
        listed.contains("`vary[0].field` is missing: a list of values needs the field that takes them"),
        "{listed}"
    );
    let unknown = grid("[{name: rank, filed: tune.steps, values: [1]}]");
    assert!(unknown.contains("unknown field `filed`"), "{unknown}");
    let empty = place.run(&["experiment", "report", "absent.yaml"]);
    assert_eq!(empty.status, 2, "{}", empty.all());
    std::fs::write(
        place.path().join("grid.yaml"),
        "version: 1\nname: g\njob: ./gone.yaml\nvary: [{name: s, field: tune.seed, values: [1]}]\n",
    )
    .unwrap();
    let gone = place.run(&["experiment", "report", "grid.yaml"]);
    assert!(gone.stderr.contains("gone.yaml"), "{}", gone.all());
}
