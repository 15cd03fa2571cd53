//! A push that fails at each of the room's fail points (`--features failpoints`) and is repeated.

use attune_artifacts::{BlobStore, Bundle, Causes, Error};
use attune_spec::id::Project;

use crate::support::model_folder;

#[tokio::test]
async fn a_push_that_fails_at_any_point_can_be_repeated() {
    let _scenario = fail::FailScenario::setup();
    let dir = tempfile::tempdir().unwrap();
    model_folder(dir.path());
    let bundle = Bundle::read(dir.path(), None).await.unwrap();
    let manifest = bundle.manifest(Causes::default()).unwrap();
    let project = Project::default();
    for (point, manifest_is_there) in
        [("artifacts::blob_stored", false), ("artifacts::before_manifest", false), ("artifacts::after_manifest", true)]
    {
        let store = BlobStore::open("memory://").await.unwrap();
        // The third time, so that the first point is hit in the middle of the blobs; the others are passed once.
        let when = if point == "artifacts::blob_stored" { "2*off->1*return->off" } else { "1*return->off" };
        fail::cfg(point, when).unwrap();
        let error = bundle.push(&store, &project, Causes::default()).await.unwrap_err();
        assert!(matches!(&error, Error::Unavailable { doing, .. } if doing.contains(point)), "{point}: {error}");
        assert!(error.retry());
        assert_eq!(store.has_manifest(&project, &manifest.digest()).await.unwrap(), manifest_is_there, "{point}");
        // Whatever was stored before the failure is whole.
        for blob in store.blobs(&project).await.unwrap() {
            store.verify(&project, blob).await.unwrap();
        }
        assert_eq!(bundle.push(&store, &project, Causes::default()).await.unwrap(), manifest, "{point}");
        assert_eq!(store.manifest(&project, &manifest.digest()).await.unwrap(), manifest, "{point}");
        fail::remove(point);
    }
}
