//! The control plane in this process; every test runs on SQLite and on PostgreSQL.

mod accounts;
mod audit_and_usage;
mod fixture;
mod instances_and_versions;
mod tokens;

use fixture::TestDatabase;

/// Generates a test for each database from functions that take an empty one.
macro_rules! on_both {
    ($($story:ident),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test]
                async fn $story() {
                    super::$story(crate::control_plane_in_process::TestDatabase::sqlite()).await;
                }
            )+
        }
        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread")]
                #[ignore = "needs PostgreSQL"]
                async fn $story() {
                    super::$story(crate::control_plane_in_process::TestDatabase::postgres().await).await;
                }
            )+
        }
    };
}
use on_both;
