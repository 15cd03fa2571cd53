//! What a job may name of a network: objects of buckets, and no host.
//!
//! Nothing that a job says makes a scheduler fetch anything, and what it makes a worker fetch is `s3://BUCKET/KEY`, from where the
//! worker's own settings say that buckets are. A client that puts the bucket before the name of that host would make
//! another host of one with `:`, `#` or the like in it, so the name of a bucket is nothing but that.

/// Whether a reference to an object names a bucket and a key; what is wrong, and what would be right.
pub(crate) fn check(url: &str) -> Result<(), String> {
    const EXPECTED: &str = "expected s3://BUCKET/KEY, BUCKET of 3 to 63 of a-z, 0-9, '.' and '-', which is no address";
    let bucket = url.strip_prefix("s3://").and_then(|rest| rest.split_once('/')).filter(|(_, key)| !key.is_empty());
    let Some((bucket, _)) = bucket else { return Err(format!("is {url:?}; {EXPECTED}")) };
    let alphanumeric = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = bucket.as_bytes();
    let is_name = (3..=63).contains(&bytes.len())
        && bytes.iter().all(|byte| alphanumeric(byte) || matches!(byte, b'.' | b'-'))
        && [bytes.first(), bytes.last()].into_iter().flatten().all(alphanumeric)
        && !bucket.contains("..")
        && bucket.parse::<std::net::Ipv4Addr>().is_err();
    if is_name { Ok(()) } else { Err(format!("names the bucket {bucket:?}; {EXPECTED}")) }
}

#[cfg(test)]
mod tests {
    use attune_spec::job::Reference;

    use super::check;

    /// Whether a job may name it, from its text to a worker.
    fn may_be_named(text: &str) -> bool {
        match text.parse::<Reference>() {
            Ok(Reference::Url(url)) => check(&url).is_ok(),
            // A file, which is another question ([`crate::config::Config::data_root`]), or what is stored here.
            Ok(_) => true,
            Err(_) => false,
        }
    }

    /// A32: by what a request to this machine, its neighbours or its cloud could be had, were an address taken.
    #[test]
    fn no_job_names_an_address() {
        assert_eq!(
            Reference::SCHEMES,
            ["s3"],
            "whatever reads another scheme has to refuse hosts that are not for jobs"
        );
        for host in [
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f000001",
            "0",
            "localhost",
            "10.0.0.1",
            "169.254.169.254",
            "metadata.google.internal",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[fe80::1]",
            "rebinds.example",
        ] {
            for scheme in ["http", "https", "ftp", "gopher", "hf", "gs", "az", "HTTP", "file"] {
                let text = format!("{scheme}://{host}/latest/meta-data.jsonl");
                assert!(!may_be_named(&text), "{text}");
            }
            for bucket in [
                format!("{host}:80"),
                format!("{host}#"),
                format!("{host}:80#"),
                format!("{host}\\"),
                format!("{host}%23"),
                format!("{host}%2f"),
                format!("u@{host}"),
                format!("u:p@{host}"),
                format!("{host}?x="),
                format!("{host}\t"),
                format!("{host}\r\nHost: x"),
                format!("{host}\u{3002}"),
            ] {
                let text = format!("s3://{bucket}/a.jsonl");
                assert!(!may_be_named(&text), "{text:?}");
            }
        }
        for bucket in
            ["127.0.0.1", "169.254.169.254", "[::1]", "a", "..", "a..b", "-ab", "ab-", "ABC", "a_b", "", "ä-b"]
        {
            assert!(!may_be_named(&format!("s3://{bucket}/a.jsonl")), "{bucket:?}");
        }
        for text in ["s3://corpora/a.jsonl", "s3://team.corpora-2/deep/b.parquet", "support:latest"] {
            assert!(may_be_named(text), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let error = check("s3://127.0.0.1:80#/a.jsonl").unwrap_err();
        assert_eq!(
            error,
            "names the bucket \"127.0.0.1:80#\"; expected s3://BUCKET/KEY, BUCKET of 3 to 63 of a-z, 0-9, '.' and '-', which is no \
             address"
        );
        assert!(check("s3://bucket").unwrap_err().starts_with("is \"s3://bucket\"; expected s3://BUCKET/KEY"));
    }
}
