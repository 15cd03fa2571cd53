//! `attune generate`.

use crate::support::Place;

#[test]
fn a_base_without_weights_and_one_that_is_not_there_are_said() {
    let place = Place::with_demo();
    let ran = place.run(&["generate", "--base", "base", "--prompt", "Hi"]);
    insta::assert_snapshot!(ran.all(), @r"
    exit status 1
    --- stdout
    --- stderr
    error: base/model.safetensors: cannot be opened: No such file or directory (os error 2)
    ");
    let ran = place.run(&["generate", "--base", "./nowhere", "--prompt", "Hi"]);
    insta::assert_snapshot!(ran.all(), @r"
    exit status 2
    --- stdout
    --- stderr
    error: ./nowhere: there is no such folder
    ");
}
