// Whether bfloat16 products run on this CPU's own units.
#pragma once

namespace luffy {

// True where ATen's brgemm multiplies VNNI-packed bfloat16 into fp32 on AMX or AVX-512 BF16, found out once by a small
// product, and oneDNN is not switched off. ATen's `could_pack` is not this question: it is false on CPUs with dot
// products and no matrix unit.
bool has_bf16_units();

}  // namespace luffy
