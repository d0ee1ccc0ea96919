// Exact dot product of one block: 32 weights times 32 int8 activations, every cycle.
//
// Weights are int8, or int4 stored as the formats store them: 0..15 where the block has a minimum (OFFSET 0), or the
// number plus 8 (OFFSET 8). Turning the top bit makes the latter two's complement.
//
// USE_DSP 0: no multipliers but distributed arithmetic (S. A. White, IEEE ASSP Magazine 6(3), 1989): sum(w * x) is the sum
//   over the bits p of w of 2**p * sum(x where bit p is set), and what a pair of activations gives is one of 0, x0, x1,
//   x0 + x1, the same four for all bits. A bit of that choice fills one LUT, and half the adders of a tree are gone: in
//   Yosys 1348 LUTs for a block of int4, where an AND per bit and a whole tree need 1670.
// USE_DSP 1: one DSP block per product. Two products cannot share one (Xilinx WP486 packs two int8 products that have a
//   factor in common): the weights of a row each meet a different activation.
//
// Latency: cycles.py, `dot`: planes 2 + 4 and 1 or 2 to put them together, DSP 1 + 5.
module block_dot #(
    parameter WEIGHT_BITS = 4,
    parameter OFFSET      = 8,
    parameter USE_DSP     = 0,
    parameter SUM_WIDTH   = WEIGHT_BITS == 4 ? 17 : 20  // |15 * 128 * 32| < 2**16; |128 * 127 * 32| < 2**19
) (
    input  wire                         clk,
    input  wire [32 * WEIGHT_BITS-1:0]  weights,      // weight j in bits WEIGHT_BITS * j and up
    input  wire [255:0]                 activations,  // activation j in bits 8 * j and up, -127..127
    output wire signed [SUM_WIDTH-1:0]  sum
);
    // Numbers in two's complement; as they are where a 4-bit one is 0..15.
    localparam [WEIGHT_BITS-1:0] TURN = WEIGHT_BITS == 4 && OFFSET == 8 ? 1 << (WEIGHT_BITS - 1) : 0;
    localparam IS_SIGNED = WEIGHT_BITS == 8 || OFFSET == 8;
    wire [32 * WEIGHT_BITS-1:0] numbers = weights ^ {32{TURN}};
    genvar j, p;
    generate
        if (USE_DSP != 0) begin : dsp
            localparam W = WEIGHT_BITS + 9;           // a bit more, so that 0..15 and -8..7 are alike
            wire [32 * W - 1:0] products;
            for (j = 0; j < 32; j = j + 1) begin : multiply
                wire [WEIGHT_BITS-1:0] number = numbers[WEIGHT_BITS * j +: WEIGHT_BITS];
                wire signed [WEIGHT_BITS:0] w = {IS_SIGNED ? number[WEIGHT_BITS-1] : 1'b0, number};
                wire signed [7:0] x = activations[8 * j +: 8];
                reg signed [W-1:0] product;
                always @(posedge clk) product <= w * x;
                assign products[W * j +: W] = product;
            end
            wire [W + 4:0] total;
            adder_tree #(.LEVELS(5), .WIDTH(W)) tree (.clk(clk), .terms(products), .sum(total));
            assign sum = total[SUM_WIDTH-1:0];
        end else begin : planes
            reg [32 * WEIGHT_BITS-1:0] numbers_q;
            reg [255:0] x;
            reg [143:0] pairs;
            always @(posedge clk) begin
                numbers_q <= numbers;
                x         <= activations;
            end
            for (j = 0; j < 16; j = j + 1) begin : pair
                wire [7:0] x0 = activations[16 * j +: 8], x1 = activations[16 * j + 8 +: 8];
                always @(posedge clk) pairs[9 * j +: 9] <= {x0[7], x0} + {x1[7], x1};
            end
            wire [SUM_WIDTH-1:0] plane [0:WEIGHT_BITS-1];
            for (p = 0; p < WEIGHT_BITS; p = p + 1) begin : bit_plane
                reg [143:0] chosen;
                for (j = 0; j < 16; j = j + 1) begin : choose
                    wire set0 = numbers_q[WEIGHT_BITS * 2 * j + p], set1 = numbers_q[WEIGHT_BITS * (2 * j + 1) + p];
                    wire [7:0] x0 = x[16 * j +: 8], x1 = x[16 * j + 8 +: 8];
                    always @(posedge clk)
                        chosen[9 * j +: 9] <= set0 && set1 ? pairs[9 * j +: 9]
                                            : set0 ? {x0[7], x0}
                                            : set1 ? {x1[7], x1}
                                            : 9'd0;
                end
                wire [12:0] total;
                adder_tree #(.LEVELS(4), .WIDTH(9)) tree (.clk(clk), .terms(chosen), .sum(total));
                assign plane[p] = {{(SUM_WIDTH - 13){total[12]}}, total} << p;
            end
            // The top bit of two's complement counts negative.
            wire [SUM_WIDTH-1:0] top = IS_SIGNED ? -plane[WEIGHT_BITS-1] : plane[WEIGHT_BITS-1];
            reg [SUM_WIDTH-1:0] total;
            if (WEIGHT_BITS == 4) begin : combine
                always @(posedge clk) total <= (plane[0] + plane[1]) + (plane[2] + top);
            end else begin : combine
                reg [SUM_WIDTH-1:0] low, high;
                always @(posedge clk) begin
                    low   <= (plane[0] + plane[1]) + (plane[2] + plane[3]);
                    high  <= (plane[4] + plane[5]) + (plane[6] + top);
                    total <= low + high;
                end
            end
            assign sum = total;
        end
    endgenerate
endmodule
